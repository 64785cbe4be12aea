"""`fastgessl train`: train a recipe, evaluate it and write the run's folder."""

from fastgessl.config import Config
from fastgessl.recipes import leading_word, load, override

RECIPE = "a composed name such as digits-simclr-gessl (`fastgessl recipes` lists them), or a YAML file"


def main(words: list[str]) -> int:
    """Run the command; returns the exit code. UsageError or DataError for what cannot be done."""
    recipe, options = leading_word(words, "train", "RECIPE", RECIPE)
    config = override(
        load(recipe).config if recipe else Config(),
        [word for word in options if word != "--print_config"],
        f"train {recipe or 'RECIPE'}",
        f"Train a recipe, evaluate it and write the run's folder. RECIPE: {RECIPE}. "
        "--print_config prints the complete configuration and stops.",
    )
    if "--print_config" in options:
        import yaml

        # `fastgessl train FILE.yaml` accepts what is printed.
        print(
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120),
            end="",
        )
        return 0
    from fastgessl.training.loop import train

    return train(config)
