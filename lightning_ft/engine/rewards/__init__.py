"""What answers are rewarded with: functions, rules, verifiers, reward models, and their weighted sum."""

from lightning_ft.engine.rewards.reward import Reward
from lightning_ft.engine.rewards.rewards import Rewards, Scores
from lightning_ft.engine.rewards.source import Completions, RewardSource, described

__all__ = ["Completions", "Reward", "RewardSource", "Rewards", "Scores", "described"]
