"""Families of drafters found by name, draftsmith's own and those of other installed packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import draftsmith
from draftsmith.artifacts.families import find, name_of, names, package_of
from draftsmith.cli import main
from draftsmith.core.drafter import Drafter
from draftsmith.drafters import lookup, medusa, suffix
from tests.support.models import tiny_target

MODULE = '''
from dataclasses import dataclass

import torch
from torch import nn

from draftsmith.core import drafter
from draftsmith.core.tree import Draft, chain


@dataclass(frozen=True, kw_only=True)
class Config:
    num_draft: int = 2


class Drafter(nn.Module, drafter.Drafter):
    """Drafts the pending token again and again."""

    def __init__(self, config, target):
        super().__init__()
        self.config = config
        object.__setattr__(self, "target", target)
        self.bias = nn.Parameter(torch.zeros(3))

    def start(self, session):
        self.session = session

    def propose(self, budget):
        length = min(budget, self.config.num_draft)
        tokens_BN = self.session.pending()[:, None].repeat(1, length + 1)
        return Draft(tokens_BN=tokens_BN, tree=chain(length + 1, self.target.device))

    def observe(self, step):
        pass
'''
SCRIPT = """
import sys, torch, draftsmith
from draftsmith.artifacts.families import find, name_of, names
from tests.support.models import tiny_target

target = tiny_target("llama")
ids = torch.tensor([[5, 6, 7]])
plain = draftsmith.generate(target, ids, max_new_tokens=12)
for name in ("echo", "mirror"):
    assert name in names()
    made = find(name).Drafter(find(name).Config(num_draft=3), target)
    made.bias.data += 1
    assert name_of(made) == name
    draftsmith.save(made, f"{sys.argv[1]}/{name}", target)
    loaded = draftsmith.load(f"{sys.argv[1]}/{name}", target)
    assert type(loaded) is type(made) and loaded.config == made.config and torch.equal(loaded.bias, made.bias)
    out = draftsmith.generate(target, ids, loaded, max_new_tokens=12)
    assert out.sequences.tolist() == plain.sequences.tolist()
    assert out.stats.drafted[2] > 0
"""


def install(folder: Path, package: str, families: dict[str, str], modules: dict[str, str]) -> None:
    """Writes a package as pip installs one: `families` are its entry points, `modules` its files."""
    for path, text in modules.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    entries = "".join(f"{name} = {module}\n" for name, module in families.items())
    (info / "entry_points.txt").write_text(f"[draftsmith.families]\n{entries}")


def test_find_returns_families_by_name() -> None:
    assert {"lm", "lookup", "medusa"} <= set(names())
    assert find("medusa") is medusa and package_of("medusa") is None
    with pytest.raises(ValueError, match="unknown drafter family 'lokup'; did you mean 'lookup'?"):
        find("lokup")
    with pytest.raises(ValueError, match="unknown drafter family 'zzz'; the families are cascade, "):
        find("zzz")


def test_name_of_knows_modules_packages_and_subclasses() -> None:
    class Mine(lookup.Drafter):
        pass

    class Other(Drafter):
        start = propose = observe = lambda *_: None  # type: ignore[assignment]

    target = tiny_target("llama")
    assert name_of(lookup.Drafter(lookup.Config(), target)) == "lookup"
    assert name_of(suffix.Drafter(suffix.Config(), target)) == "suffix"
    assert name_of(Mine(lookup.Config(), target)) == "lookup"
    with pytest.raises(ValueError, match="Other is the Drafter of no family; name its module in the entry-point group"):
        name_of(Other())


def test_family_of_an_installed_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a family drafts, is saved and loaded; without the package its artifact names what to install."""
    package = tmp_path / "site-packages"
    modules = {
        "acme/__init__.py": "",
        "acme/echo.py": MODULE,
        "acme/mirror/__init__.py": "from acme.mirror.drafter import Config, Drafter",
        "acme/mirror/drafter.py": MODULE,
    }
    install(package, "acme-drafters", {"echo": "acme.echo", "mirror": "acme.mirror"}, modules)
    paths = os.pathsep.join([str(package), str(Path(__file__).parents[2])])
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    message = "is of family 'echo', which the package acme-drafters defines; install that package"
    with pytest.raises(ValueError, match=message):
        draftsmith.load(tmp_path / "echo", tiny_target("llama"))
    main(["inspect", str(tmp_path / "echo")])
    out, err = capsys.readouterr()
    assert "a drafter of family echo" in out and message in err


def test_find_rejects_a_family_defined_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "acme-lookup", {"lookup": "acme_lookup"}, {"acme_lookup.py": MODULE})
    monkeypatch.syspath_prepend(tmp_path)
    assert names().count("lookup") == 1
    with pytest.raises(ValueError, match="family 'lookup' is defined by draftsmith and acme-lookup; uninstall all but"):
        find("lookup")
    assert find("medusa") is medusa


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("class Drafter: ...", "ImportError: acme_broken does not define Config"),
    ],
)
def test_broken_package_fails_only_when_its_family_is_requested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    install(tmp_path, "acme-broken", {"acme": "acme_broken"}, {"acme_broken.py": text})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_broken", raising=False)
    assert "acme" in names() and find("medusa") is medusa
    with pytest.raises(ValueError, match=rf"'acme' of the installed package acme-broken cannot be imported \({reason}"):
        find("acme")
