"""scripts/package.sh: what goes into the zip and what stays out, its names, the report.

Also line endings of a clone, and setup.sh's refusals.
"""

import os
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PDF = b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\nstartxref\n9\n%%EOF\n"
COPIED = ["utils/__init__.py", "utils/cli.py", "utils/files.py", "LICENSE", "requirements.txt",
          "scripts/package.sh", "scripts/package.py", "scripts/python.sh"]
SOURCE = {
    "Trainer.py": "from helpers.loss import loss\nprint('trained', loss)\n", "Tester.py": "",
    "dataloader.py": "import utils.cli\n", "my_losses.py": "", "README.md": "# Lab\n",
    "modules/__init__.py": "", "modules/layers.py": "", "modules/modules.py": "",
    "my_parts/__init__.py": "from . import deep\n", "my_parts/deep.py": "",
    "helpers/loss.py": "loss = 1\n",
}
LEFT_OUT = [  # of this project, or of its user: no command needs them
    ".gitignore", ".gitattributes", ".ci/run", "requirements-dev.txt", "scripts/test.sh",
    "docs/EXAMPLE_REPORT.md", "docs/ablation.csv", "docs/conf.py", "docs/__init__.py", "REPORT.md",
    "tests/test_step.py", "tests/__init__.py", "tests/modules.json", "scripts/notes.md",
]
JUNK = LEFT_OUT + [
    "data/train/train_img/0.png", "data/notes.txt", "ckpt/best.ckpt", "ckpt/history.csv",
    "best.pth", "demo/test/submission.csv", "demo/test/pred_seq0.gif", "pred_seq0.gif",
    "submission.csv", "docs/figure.png", "docs/report.pdf", "scripts/weights.npy",
    "modules/__pycache__/layers.cpython-311.pyc", "tests/.pytest_cache/README.md",
    ".venv/pyvenv.cfg", ".venv/lib/site.py", "scripts/env/pyvenv.cfg", "scripts/env/lib/site.py",
    ".git/config", ".ipynb_checkpoints/Trainer.py", "LAB4_1_old.zip", "LAB4_1_old/Trainer.py",
    "wandb/run.json", ".env", "notes.txt", "modules/layers.py.bak", "runs/a/code.py",
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
    for name in COPIED:
        write(root, name, (ROOT / name).read_bytes())
    for name, content in SOURCE.items():
        write(root, name, content)
    for name in JUNK:
        write(root, name, b"\x00" * 100)
    write(root, "scripts/huge.py", b"#" * (2**21 + 1))
    (root / "scripts" / "gone.py").symlink_to("nowhere")
    (root / ".#Trainer.py").symlink_to("user@host.1")  # Emacs marks an unsaved file so
    (root / "my_parts" / "linked").symlink_to(root / "data")
    return root


def package(tree, *args, cwd=None, **env):
    command = ["bash", str(tree / "scripts" / "package.sh"), *map(str, args)]
    return subprocess.run(command, capture_output=True, cwd=cwd or tree,
                          env={**os.environ, "PYTHON": sys.executable, **env})


def refused(done, folder, before):
    """Return whether it ended with status 2, one line on stderr, and nothing written."""
    return (done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
            and set(os.listdir(folder)) == before)


def test_holds_the_source_and_nothing_else(tree):
    done = package(tree, "313553009", "林于翔")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tree / "LAB4_313553009_林于翔.zip") as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
    source = {*SOURCE, *COPIED}
    assert names == {f"LAB4_313553009_林于翔/{name}" for name in source}
    out = done.stdout.decode()
    assert f"{len(source)} files" in out and "virtual environment" in out
    assert "weights" in out and "image" in out
    assert "runs/a/code.py" in out  # a Python file that stays out is named


def test_unpacks_to_a_tree_whose_commands_run(tree, tmp_path):
    assert package(tree, "1", "Ada Lovelace").returncode == 0
    first = tree / "LAB4_1_Ada_Lovelace.zip"
    with zipfile.ZipFile(first) as archive:
        executable = {info.filename.split("/", 1)[1] for info in archive.infolist()
                      if info.external_attr >> 16 & 0o100}
        archive.extractall(tmp_path)
    assert executable == {"scripts/package.sh", "scripts/python.sh"}
    unpacked = (tmp_path / "LAB4_1_Ada_Lovelace").rename(tmp_path / "a path with spaces")
    done = subprocess.run([sys.executable, "Trainer.py"], cwd=unpacked, capture_output=True,
                          text=True)
    assert done.stdout == "trained 1\n"
    assert package(unpacked, "1", "Ada Lovelace").returncode == 0  # without git
    with zipfile.ZipFile(first) as a, zipfile.ZipFile(unpacked / first.name) as b:
        assert a.namelist() == b.namelist()


def test_writes_into_the_current_folder_and_over_an_old_one(tree, tmp_path):
    write(tmp_path, "LAB4_1_x.zip", b"old")
    assert package(tree, "1", "x", cwd=tmp_path).returncode == 0
    assert zipfile.is_zipfile(tmp_path / "LAB4_1_x.zip")
    assert sorted(os.listdir(tmp_path)) == ["LAB4_1_x.zip", "work"]
    mode = (tmp_path / "LAB4_1_x.zip").stat().st_mode
    assert mode & 0o777 == (tree / "Trainer.py").stat().st_mode & 0o777


def test_spaces_become_underscores_and_a_line_tells(tree):
    """The assignment's form is LAB4_{id}_{name}, and submission systems change spaces anyway."""
    done = package(tree, " 313553009", "Yu  Hsiang\u3000Lin ")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tree / "LAB4_313553009_Yu_Hsiang_Lin.zip") as archive:
        assert "LAB4_313553009_Yu_Hsiang_Lin/Trainer.py" in archive.namelist()
    told = [line for line in done.stdout.decode().splitlines() if "underscores" in line]
    assert len(told) == 1 and "Yu_Hsiang_Lin" in told[0] and told[0].startswith("NAME")
    assert b"underscores" not in package(tree, "1", "Lin").stdout


@pytest.mark.parametrize("name", ["José_Ñandú", "نیلوفر", "Zoë_🐧", "O'Neil-Smith", "Jose\u0301",
                                  "x" * 242])
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_any_name(tree, name, locale):
    done = package(tree, "1", name, LC_ALL=locale)
    assert done.returncode == 0, done.stderr
    name = unicodedata.normalize("NFC", name)
    with zipfile.ZipFile(tree / f"LAB4_1_{name}.zip") as archive:
        assert f"LAB4_1_{name}/Trainer.py" in archive.namelist()


@pytest.mark.parametrize("args", [
    ("1", "a/b"), ("1", "a\nb"), ("1", "a\x7f"), ("1", "a:b"), ("1", ""), (" ", "x"), ("../1", "x"),
    ("1", "x" * 250), ("1",), (), ("1", "a", "b"), ("1", "a", "--what"), ("1", b"\xff\xfe")])
def test_refuses_a_bad_name(tree, args):
    before = set(os.listdir(tree))
    args = [arg if isinstance(arg, bytes) else arg.encode() for arg in args]
    command = [b"bash", os.fsencode(tree / "scripts" / "package.sh"), *args]
    done = subprocess.run(command, capture_output=True, cwd=tree,
                          env={**os.environ, "PYTHON": sys.executable})
    assert refused(done, tree, before), done.stderr


def test_report_is_named_beside_the_zip(tree, tmp_path):
    report = write(tmp_path, "my report.PDF", PDF)
    for _ in range(2):  # the second time it lies there already
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


@pytest.mark.parametrize("name", ["modules/layers.py", "Tester.py", "utils/muon.py"])
def test_refuses_a_tree_that_lacks_a_needed_file(tree, name):
    write(tree, "Trainer.py", "from utils.muon import Muon\n")
    write(tree, "utils/muon.py")
    (tree / name).unlink()
    before = set(os.listdir(tree))
    done = package(tree, "1", "x")
    assert refused(done, tree, before) and name.encode() in done.stderr


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
    assert {"Trainer.py", "Tester.py", "dataloader.py", "README.md", "LICENSE", "requirements.txt",
            "modules/modules.py", "scripts/demo.sh", "scripts/setup.sh"} <= names
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob("utils/*.py")} <= names
    assert {name.split("/")[0] for name in names if "/" in name} == {"modules", "scripts", "utils"}
    assert {Path(name).suffix for name in names} <= {".py", ".sh", ".md", ".txt", ".html", ""}
    assert (tmp_path / "LAB4_1_x.zip").stat().st_size < 2**20


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_a_clone_has_unix_line_endings_on_every_client(tmp_path):
    """With core.autocrlf, Git for Windows' default, scripts would get CRLF, and bash fails."""
    done = subprocess.run(["git", "-c", "core.autocrlf=true", "checkout-index", "--all",
                           f"--prefix={tmp_path}/"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    texts = [path for suffix in ("sh", "py", "txt") for path in tmp_path.rglob(f"*.{suffix}")]
    assert len(texts) > 20 and not [path for path in texts if b"\r" in path.read_bytes()]


@pytest.mark.parametrize("script", ["setup", "test", "demo", "package"])
def test_a_python_that_is_none_is_one_line(tmp_path, script):
    args = ["1", "x"] if script == "package" else []
    done = subprocess.run(["bash", str(ROOT / "scripts" / f"{script}.sh"), *args],
                          capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHON": "/nowhere/python"})
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "/nowhere/python" in done.stderr
    assert not os.listdir(tmp_path)


def test_a_python_that_has_everything_is_used_as_it_is(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "setup.sh"), "requirements-dev.txt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 0, done.stderr
    assert done.stdout == sys.executable + "\n" and done.stderr == ""


PLACES = ["bin/python", "Scripts/python.exe"]  # of a virtual environment, also on Windows


def wrapped_python(tree, place, note):
    """Put a Python into a tree's .venv that first appends a line to the file `note`."""
    python = tree / ".venv" / place
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho used >> "{note}"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


@pytest.mark.parametrize("place", PLACES)
def test_without_PYTHON_a_script_takes_the_virtual_environment(tree, tmp_path, place):
    wrapped_python(tree, place, tmp_path / "note")
    done = subprocess.run(["bash", str(tree / "scripts" / "package.sh"), "1", "x"], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "PYTHON": ""})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "note").exists() and (tmp_path / "LAB4_1_x.zip").exists()


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_setup_takes_a_whole_virtual_environment_of_the_project(tmp_path, place, locks):
    """Also on a file system without locks."""
    path = os.environ["PATH"]
    if not locks:
        (tmp_path / "flock").write_text("#!/bin/sh\necho flock: 9: Bad file >&2\nexit 1\n")
        (tmp_path / "flock").chmod(0o755)
        path = f"{tmp_path}:{path}"
    for name in ("scripts/setup.sh", "requirements.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    python = wrapped_python(tmp_path, place, tmp_path / "note")
    done = subprocess.run(["bash", str(tmp_path / "scripts" / "setup.sh"), "requirements.txt"],
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHON": "", "PATH": path})
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{python}\n" and done.stderr == ""
