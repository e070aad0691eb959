"""scripts/package.sh: what goes into the hand-in and what stays out, its names, the report; and setup.sh's refusals."""

import os
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PDF = b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\nstartxref\n9\n%%EOF\n"
SOURCE = {
    "Trainer.py": "print('trained')\n", "Tester.py": "", "dataloader.py": "", "my_losses.py": "", "README.md": "# Lab\n",
    "modules/__init__.py": "", "modules/layers.py": "", "modules/modules.py": "", "my_parts/__init__.py": "", "my_parts/deep.py": "",
    ".gitignore": "*.ckpt\n", "docs/RECIPE.md": "", "docs/numbers.csv": "a,b\n1,2\n", "tests/modules.json": "{}\n",
    ".ci/run": "#!/usr/bin/env bash\ntrue\n", "requirements-dev.txt": "",
}
JUNK = [
    "data/train/train_img/0.png", "data/notes.txt", "ckpt/best.ckpt", "ckpt/history.csv", "best.pth", "demo/test/submission.csv",
    "demo/test/pred_seq0.gif", "pred_seq0.gif", "submission.csv", "docs/figure.png", "docs/submission.csv", "docs/report.pdf",
    "scripts/weights.npy", "modules/__pycache__/layers.cpython-311.pyc", "tests/.pytest_cache/README.md", ".venv/pyvenv.cfg",
    ".venv/lib/site.py", "scripts/env/pyvenv.cfg", "scripts/env/lib/site.py", ".git/config", ".ipynb_checkpoints/Trainer.py",
    "LAB4_1_old.zip", "LAB4_1_old/Trainer.py", "wandb/run.json", ".env", "notes.txt", "modules/layers.py.bak", "runs/a/code.py",
]


def write(root, name, content=""):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.fixture
def tree(tmp_path):
    """A working folder, no git, with the source and everything that may lie around it."""
    root = tmp_path / "work"
    for name in ("utils/__init__.py", "utils/cli.py", "LICENSE", "requirements.txt", "scripts/package.sh", "scripts/package.py", "scripts/python.sh"):
        write(root, name, (ROOT / name).read_bytes())
    for name, content in SOURCE.items():
        write(root, name, content)
    for name in JUNK:
        write(root, name, b"\x00" * 100)
    write(root, "docs/huge.txt", b"x" * (2**21 + 1))
    (root / "docs" / "gone.md").symlink_to("nowhere")
    (root / "tests" / "linked").symlink_to(root / "data")
    return root


def package(tree, *args, cwd=None, **env):
    command = ["bash", str(tree / "scripts" / "package.sh"), *map(str, args)]
    return subprocess.run(command, capture_output=True, cwd=cwd or tree, env={**os.environ, "PYTHON": sys.executable, **env})


def refused(done, folder, before):
    """Whether it ended with status 2, one line on stderr, and nothing written."""
    return done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout and set(os.listdir(folder)) == before


def test_holds_the_source_and_nothing_else(tree):
    done = package(tree, "313553009", "林于翔")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tree / "LAB4_313553009_林于翔.zip") as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
    source = {*SOURCE, "utils/__init__.py", "utils/cli.py", "LICENSE", "requirements.txt", "scripts/package.sh", "scripts/package.py", "scripts/python.sh"}
    assert names == {f"LAB4_313553009_林于翔/{name}" for name in source}
    out = done.stdout.decode()
    assert f"{len(source)} files" in out and "virtual environment" in out and "weights" in out and "picture" in out
    assert "runs/a/code.py" in out  # a Python file that stays out is named


def test_unpacks_to_a_tree_whose_commands_run(tree, tmp_path):
    assert package(tree, "1", "Ada Lovelace").returncode == 0
    first = tree / "LAB4_1_Ada Lovelace.zip"
    with zipfile.ZipFile(first) as archive:
        executable = {info.filename.split("/", 1)[1] for info in archive.infolist() if info.external_attr >> 16 & 0o100}
        archive.extractall(tmp_path)
    assert executable == {"scripts/package.sh", "scripts/python.sh", ".ci/run"}
    unpacked = tmp_path / "LAB4_1_Ada Lovelace"
    done = subprocess.run([sys.executable, "Trainer.py"], cwd=unpacked, capture_output=True, text=True)
    assert done.stdout == "trained\n"
    assert package(unpacked, "1", "Ada Lovelace").returncode == 0  # without git, in a path with a space
    with zipfile.ZipFile(first) as a, zipfile.ZipFile(unpacked / first.name) as b:
        assert a.namelist() == b.namelist()


def test_writes_into_the_current_folder_and_over_an_old_one(tree, tmp_path):
    write(tmp_path, "LAB4_1_x.zip", b"old")
    assert package(tree, "1", "x", cwd=tmp_path).returncode == 0
    assert zipfile.is_zipfile(tmp_path / "LAB4_1_x.zip")
    assert sorted(os.listdir(tmp_path)) == ["LAB4_1_x.zip", "work"]
    assert (tmp_path / "LAB4_1_x.zip").stat().st_mode & 0o777 == (tree / "Trainer.py").stat().st_mode & 0o777


@pytest.mark.parametrize("name", ["José Ñandú", "نیلوفر", "Zoë 🐧", "O'Neil-Smith", "Jose\u0301"])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_any_name(tree, name, locale):
    done = package(tree, "1", name, LC_ALL=locale)
    assert done.returncode == 0, done.stderr
    name = unicodedata.normalize("NFC", name)
    with zipfile.ZipFile(tree / f"LAB4_1_{name}.zip") as archive:
        assert f"LAB4_1_{name}/Trainer.py" in archive.namelist()


@pytest.mark.parametrize("args", [("1", "a/b"), ("1", "a\nb"), ("1", "a\x7f"), ("1", "a:b"), ("1", ""), (" ", "x"), ("../1", "x"),
                                  ("1", "x" * 250), ("1",), (), ("1", "a", "b"), ("1", "a", "--what"), ("1", b"\xff\xfe")])
def test_refuses_a_bad_name(tree, args):
    before = set(os.listdir(tree))
    command = [b"bash", os.fsencode(tree / "scripts" / "package.sh"), *(arg if isinstance(arg, bytes) else arg.encode() for arg in args)]
    done = subprocess.run(command, capture_output=True, cwd=tree, env={**os.environ, "PYTHON": sys.executable})
    assert refused(done, tree, before), done.stderr


def test_report_is_named_beside_the_zip(tree, tmp_path):
    report = write(tmp_path, "my report.PDF", PDF)
    for _ in range(2):  # the second time it lies there already, and may be the one that is handed over
        done = package(tree, "1", "林", "--report", report)
        assert done.returncode == 0, done.stderr
        assert (tree / "LAB4_1_林.pdf").read_bytes() == PDF
        report = tree / "LAB4_1_林.pdf"


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 a document", PDF[:40]])
def test_refuses_a_bad_report(tree, content):
    if content is not None:
        write(tree, "report.pdf", content)
    before = set(os.listdir(tree))
    done = package(tree, "1", "x", "--report", "report.pdf")
    assert refused(done, tree, before) and b"report.pdf" in done.stderr, done.stderr


def test_refuses_a_tree_that_lacks_a_needed_file(tree):
    (tree / "modules" / "layers.py").unlink()
    before = set(os.listdir(tree))
    done = package(tree, "1", "x")
    assert refused(done, tree, before) and b"modules/layers.py" in done.stderr


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_refuses_a_folder_that_cannot_be_written(tree, tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    assert refused(package(tree, "1", "x", cwd=folder), folder, set())


def test_packs_this_project(tmp_path):
    done = package(ROOT, "1", "x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / "LAB4_1_x.zip") as archive:
        names = {name.split("/", 1)[1] for name in archive.namelist()}
    assert {"Trainer.py", "Tester.py", "utils/cli.py", "modules/modules.py", "scripts/demo.sh", "scripts/setup.sh", ".ci/run"} <= names
    assert {Path(name).suffix for name in names} <= {".py", ".sh", ".md", ".txt", ".json", ".csv", ".html", ""}
    assert (tmp_path / "LAB4_1_x.zip").stat().st_size < 2**20
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True) if (ROOT / ".git").exists() else None
    if tracked is not None and tracked.returncode == 0:  # pictures aside, nothing of the project is forgotten
        here = {name for name in tracked.stdout.split("\0") if (ROOT / name).is_file()}
        assert {name for name in here if not name.endswith((".png", ".gif", ".svg"))} <= names


@pytest.mark.parametrize("script", ["setup", "test", "demo", "package"])
def test_a_python_that_is_none_is_one_line(tmp_path, script):
    done = subprocess.run(["bash", str(ROOT / "scripts" / f"{script}.sh"), *(["1", "x"] if script == "package" else [])],
                          capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHON": "/nowhere/python"})
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "/nowhere/python" in done.stderr
    assert not os.listdir(tmp_path)


def test_a_python_that_has_everything_is_used_as_it_is(tmp_path):
    done = subprocess.run(["bash", str(ROOT / "scripts" / "setup.sh"), "requirements-dev.txt"], capture_output=True, text=True,
                          cwd=tmp_path, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    assert done.stdout == sys.executable + "\n" and done.stderr == ""
