import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "gessl.md"


def test_the_examples_of_the_page_train_and_measure():
    scope = {"__name__": "__main__"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), scope)
    history = scope["history"]
    assert [sorted(metrics) for metrics in history] == [["delta_loss", "loss_ssl", "sigma"]] * 6
    assert history[-1]["loss_ssl"] < history[0]["loss_ssl"]
    assert scope["sigma"] > 0 and scope["result"].metrics["sigma"] > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in scope["one_way"].parameters())
