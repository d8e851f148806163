"""The examples of docs/engines.md are compiled and run, and what they write is read back."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from jaxref.aprt import read_aprt
from oracle.trees import Tree

PAGE = (Path(__file__).parent.parent / "docs" / "engines.md").read_text(encoding="utf-8")
MAIN = {
    "c": """
int main(int n, char **a) {
    float x[6] = {0, 1.5f, -2, 3, 1e-40f, 65504};
    return save(a[1], 3, "attn_norm", x, 6) || save(a[1], -1, "lm_head", x, 6);
}
""",
    "rust": """
fn main() {
    let dir = std::env::args().nth(1).unwrap();
    let x = [0.0, 1.5, -2.0, 3.0, 1e-40, 65504.0];
    save(Path::new(&dir), Some(3), "attn_norm", &x).unwrap();
    save(Path::new(&dir), None, "lm_head", &x).unwrap();
}
""",
}
VALUES = np.array([0, 1.5, -2, 3, 1e-40, 65504], np.float32)


def example(language: str, holds: str = "") -> str:
    """The page's one example in a language that holds some words."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    (code,) = (code for code in found if holds in code)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    return code


def check(folder: Path) -> None:
    for path, layer in ((folder / "layer-3" / "attn_norm.bin", 3), (folder / "lm_head.bin", None)):
        found, values = read_aprt(path)
        assert found == layer
        np.testing.assert_array_equal(values, VALUES)


def runs(compiler: str) -> bool:
    """Whether it is there and works: rustup leaves a `rustc` that has no compiler yet."""
    return (
        shutil.which(compiler) is not None
        and subprocess.run([compiler, "--version"], capture_output=True).returncode == 0
    )


@pytest.mark.parametrize(("language", "compiler"), [("c", ["cc", "-Wall"]), ("rust", ["rustc"])])
def test_a_compiled_example_writes_what_the_page_says(tmp_path: Path, language: str, compiler: list[str]) -> None:
    if not runs(compiler[0]):
        pytest.skip(f"needs {compiler[0]}")
    source = tmp_path / f"main.{'c' if language == 'c' else 'rs'}"
    source.write_text(example(language) + MAIN[language])
    done = subprocess.run([*compiler, source, "-o", tmp_path / "save"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    subprocess.run([tmp_path / "save", tmp_path / "tree"], check=True)
    check(tmp_path / "tree")


def test_the_python_example_writes_what_the_page_says(tmp_path: Path) -> None:
    names: dict = {}
    exec(example("python", "save_file"), names)
    names["finish"]({"layer-3/attn_norm": VALUES.reshape(1, 6), "lm_head": VALUES}, tmp_path / "trace.safetensors")
    tree = Tree(tmp_path / "trace.safetensors", "test")
    assert tree.files.keys() == {(3, "attn_norm"), (None, "lm_head")}
    for key in tree.files:
        np.testing.assert_array_equal(tree.open(key).values[:], VALUES)
