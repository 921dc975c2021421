"""Files that others read: PEFT adapters, merged Hugging Face folders."""
