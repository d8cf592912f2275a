"""Few-shot evaluation: tasks, methods, metrics and the loop that runs them.

results = evaluate(EvalSettings(repo="hub_configs/aim-tiny", tasks=("episodes:test.jsonl",), output="build/eval"))
"""

from .methods import METHODS, Method, Prompt, PromptBuilder, ShownShot
from .report import eval_results
from .runner import evaluate
from .settings import EvalSettings
from .task import Example, Prediction, Shot, Task

__all__ = [
    "METHODS", "EvalSettings", "Example", "Method", "Prediction", "Prompt", "PromptBuilder", "Shot", "ShownShot",
    "Task", "eval_results", "evaluate",
]  # fmt: skip
