"""The runbook: what it names exists, and the error texts that it explains are those that the code raises."""

import ast
import re
from functools import cache

import pytest
from deploy_files import DEPLOY, ROOT, files, load

from pipeline import errors

RUNBOOK = (DEPLOY / "README.md").read_text()
SECTION = RUNBOOK.partition("## Error texts")[2].partition("\n## ")[0]
ROWS = [line.split(" | ") for line in SECTION.splitlines() if line.startswith("| `")]
TEXTS = [(text, row[1].strip()) for row in ROWS for text in re.findall(r"`([^`]+)`", row[0]) if row[1].strip()]


def said(node):
    """Return the text of an expression, with {} for what is put in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return said(node.left) + said(node.right)
    return "{}"


@cache
def raised():
    """Return (class, message) of every error that is made in the sources."""
    sources = [path.read_text() for folder in ("pipeline", "flows") for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    calls = [node for node in nodes if node.args and getattr(node.func, "id", "").endswith("Error")]
    return [(node.func.id, said(node.args[0])) for node in calls]


def pieces(text):
    """Return the parts of an explained text that must be there word for word."""
    parts = re.split(r"\.\.\.|\bN\b|HALOSEG_ROOTS|HALOSEG_CLUSTERS|\b\d+ s\b", text)
    return [part.strip(" .,") for part in parts if part.strip(" .,")]


@pytest.mark.parametrize(("text", "kind"), TEXTS)
def test_an_explained_error_is_one_that_is_raised(text, kind):
    assert issubclass(getattr(errors, kind), errors.PipelineError)
    found = [name for name, message in raised() if all(piece in message for piece in pieces(text))]
    assert kind in found, f"{text}: {found}"


def test_every_kind_of_error_is_explained():
    leaves = {
        name for name, each in vars(errors).items()
        if isinstance(each, type) and issubclass(each, errors.PipelineError) and not each.__subclasses__()
    }  # fmt: skip
    assert leaves - {kind for _, kind in TEXTS} - {"GivenUpError"} == set()  # that one says itself what it is


def test_files_and_variables_that_the_runbook_names_exist():
    path = r"`((?:kubernetes|slurm|prometheus|tests|build)/[\w./-]+|[\w-]+\.(?:sh|yaml|txt|py))`"
    names = set(re.findall(path, RUNBOOK))
    assert len(names) > 5
    missing = [name for name in names if not (DEPLOY / name).exists() and not (ROOT / name).exists()]
    assert set(missing) <= {"build/serve"}
    text = "".join(path.read_text() for path in files() if path.name != "README.md")
    text += "".join(path.read_text() for path in (ROOT / "pipeline").rglob("*.py"))
    assert [name for name in set(re.findall(r"\bHALOSEG_\w+", RUNBOOK)) if name not in text] == []


def test_every_deployment_is_in_the_runbook():
    section = RUNBOOK.partition("### Deployments")[2].partition("\n## ")[0]
    named = re.findall(r"^\| `(\w+)/([\w-]+)` ", section, re.MULTILINE)
    assert [name for _, name in named] == [each["name"] for each in load("prefect.yaml")["deployments"]]
    for flow, name in named:
        (deployment,) = [each for each in load("prefect.yaml")["deployments"] if each["name"] == name]
        path = ROOT / deployment["entrypoint"].partition(":")[0]
        assert not path.exists() or f'@flow(name="{flow}"' in path.read_text()


def test_no_table_is_broken():
    for block in re.findall(r"(?:^\|.*\n)+", RUNBOOK, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
