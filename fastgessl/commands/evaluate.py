"""`fastgessl evaluate`: measure what a run, a timm model or a file of weights has learned."""

from fastgessl.config import Config
from fastgessl.recipes import leading_word, override

TARGET = "the folder of a run, timm:NAME, or a .safetensors file"
SHORT = {"--tasks": "--evaluate.tasks", "--transfer": "--evaluate.transfer"}


def main(words: list[str]) -> None:
    """Run the command. UsageError or DataError for what cannot be done."""
    from fastgessl.evaluate.subject import base_config, open_subject

    target, options = leading_word(words, "evaluate", "TARGET", TARGET)
    config = override(
        base_config(target) if target else Config(),
        [SHORT.get(word, word) for word in options],
        f"evaluate {target or 'TARGET'}",
        f"Measure what an encoder has learned. TARGET: {TARGET}. --tasks and --transfer are short for "
        "--evaluate.tasks and --evaluate.transfer.",
    )
    from fastgessl.evaluate.run import evaluate_subject

    evaluate_subject(open_subject(target, config))
