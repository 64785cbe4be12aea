"""Importing the package: one name only, nothing heavy, soon done."""

import subprocess
import sys
from pathlib import Path

import fastgessl.kernels

ROOT = Path(fastgessl.kernels.__file__).resolve().parents[1]
HEAVY = ("nvidia", "torchvision", "timm", "accelerate", "matplotlib", "pydantic", "triton", "numpy.testing")


def run(code, cwd=ROOT):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def test_a_bare_import_of_the_folder_is_refused():
    found = run("import kernels")
    assert found.returncode and "Write `import fastgessl.kernels`" in found.stderr


def test_import_brings_in_nothing_that_torch_does_not():
    code = (
        "import sys, torch; before = set(sys.modules); import fastgessl.kernels; "
        f"print([m for m in set(sys.modules) - before if m.split('.')[0] in {HEAVY}])"
    )
    found = run(code)
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_every_public_name_exists_and_the_list_is_sorted():
    names = fastgessl.kernels.__all__
    assert all(hasattr(fastgessl.kernels, name) for name in names)
    assert sorted(names) == names


def test_without_triton_as_on_macos_and_windows_losses_and_views_work():
    code = """
import sys
sys.modules["triton"] = None
import torch
from fastgessl.kernels import ViewParameters, augment_views, implementation_for, nt_xent
rows = torch.randn(2, 600, 8, requires_grad=True)
found, expected = (
    torch.autograd.grad(nt_xent(*rows, implementation=name), rows)[0] for name in (None, "reference")
)
torch.testing.assert_close(found, expected)
images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
augment_views(images, ViewParameters.unchanged(2, 8, 8), size=4, mean=(0.5,) * 3, std=(0.5,) * 3)
print(implementation_for(rows)[0])
"""
    found = run(code)
    assert found.stdout.strip() == "chunked", found.stdout + found.stderr
