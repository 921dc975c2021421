"""The starter sentences through the starter model's own tokenizer and template, as the quickstart uses them."""

import pytest

from lightning_ft.data.sft_data import SFTData


@pytest.mark.starter
def test_quickstart_rows_learn_the_answer_and_its_end(tmp_path):
    data = SFTData(
        "starter:vader/train",
        test_path="starter:vader/test",
        tokenizer="starter:smollm2-135m",
        cache_dir=str(tmp_path),
    )
    data.setup("fit")
    report = data.reports()["train"]
    assert (report.rows, report.kept, report.scored) == (800, 800, 1600)  # a word and its end of turn, 800 times
    for preview in data.preview(5):
        learned = [piece.text for piece in preview.pieces if piece.scored]
        assert learned in (["positive<|im_end|>"], ["negative<|im_end|>"])
        assert preview.pieces[0].text.endswith("<|im_start|>assistant\n")
    answers = {tuple(batch.labels.tolist()[:2]) for batch in data.train_dataloader()}
    eos = data.resolve_tokenizer().eos_token_id
    assert {end for _, end in answers} == {eos} and len(answers) == 2
