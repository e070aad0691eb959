"""Write LAB4_{STUDENT_ID}_{NAME}.zip for the hand-in; called by scripts/package.sh, which finds the Python.

    bash scripts/package.sh 313553009 林于翔 --report my_report.pdf

What goes in is on a list (the source tree, by folder and suffix), so whatever else lies in the working folder stays out:
data sets, pictures, checkpoints, outputs of runs, caches, environments, other zips. Git is not asked.
"""

import os
import shutil
import stat
import sys
import tempfile
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.cli import Parser, UserError, run  # noqa: E402

TOP_FILES = {"README.md", "LICENSE", ".gitignore", "requirements.txt", "requirements-dev.txt"}  # and every *.py
SUFFIXES = {  # folder: the suffixes that are source there
    "modules": {".py"},
    "scripts": {".py", ".sh", ".md", ".txt", ".json", ".html"},
    "tests": {".py", ".sh", ".md", ".txt", ".json"},
    "docs": {".py", ".sh", ".md", ".txt", ".json", ".csv"},
    ".ci": {".py", ".sh", ".md", ".txt", ".json", ""},
}
NEEDED = ["Trainer.py", "Tester.py", "dataloader.py", "requirements.txt"]
NEEDED += [f"modules/{name}.py" for name in ("__init__", "layers", "modules")]
LARGEST = 2 * 2**20  # bytes; no source file comes near, an output of a run under a source file's name does

CACHES = {"__pycache__", "node_modules"}
KINDS = {
    "picture": ".png .gif .jpg .jpeg .webp .bmp .svg .pdf .mp4",
    "weights or checkpoint": ".ckpt .pt .pth .bin .safetensors .npy .npz .pkl .onnx",
    "CSV": ".csv",
    "archive": ".zip .tar .gz .tgz .bz2 .xz .7z .rar .part",
    "cache": ".pyc .pyo",
}
KIND_OF = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes.split()}

FORBIDDEN = '/\\:*?"<>|'  # in no file name on Linux, macOS or Windows, where a grader may unpack
LONGEST_NAME = 255  # bytes, of one file name


def name_part(text, what):
    """The student's id or name as it goes into the file name."""
    text = unicodedata.normalize("NFC", text).strip()
    if not text:
        raise UserError(f"{what}: is empty; expected it as it goes into the file name")
    for char in text:
        if char in FORBIDDEN or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
            raise UserError(f"{what} {text!a}: {char!a} cannot be in a file name")
    return text


def folder_kind(path):
    """What a folder that is left out whole is, or None."""
    if path.name == ".git":
        return "git folder"
    if (path / "pyvenv.cfg").exists() or (path / "conda-meta").exists() or path.name == ".venv":
        return "virtual environment"
    if path.name in CACHES or (path.name.startswith(".") and path.name != ".ci"):
        return "cache"
    return None


def is_source(path, package_folders):
    """Whether a file, by its path relative to the root, belongs to the source tree."""
    top, suffix = path.parts[0], path.suffix
    if len(path.parts) == 1:
        return suffix == ".py" or path.name in TOP_FILES
    if path.name == "submission.csv":
        return False
    return path.name == "LICENSE" or suffix in SUFFIXES.get(top, {".py"} if top in package_folders else ())


def source_files(root):
    """(the files that go in, sorted; how many of each kind stay out; Python files among those)."""
    # a folder of the user's own that can be imported from the root is source too
    package_folders = {path.parent.name for path in root.glob("*/__init__.py")}
    inside, outside, strays = [], Counter(), []

    def stop(error):
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    for folder, folders, files in os.walk(root, onerror=stop):
        for name in sorted(folders):
            path = Path(folder, name)
            kind = "link" if path.is_symlink() else folder_kind(path)
            if kind:
                outside[kind] += 1
                folders.remove(name)
        for name in files:
            path = Path(folder, name)
            relative = path.relative_to(root)
            if is_source(relative, package_folders) and path.is_file() and path.stat().st_size <= LARGEST:
                inside.append(relative)
                continue
            outside[KIND_OF.get(path.suffix.lower(), "other file")] += 1
            if path.suffix == ".py":
                strays.append(relative.as_posix())
    return sorted(inside), outside, sorted(strays)


def check_report(path):
    """Raise UserError unless path is a whole PDF."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--report {path}: cannot be read ({error.strerror})")
    if not content:
        raise UserError(f"--report {path}: is empty")
    if b"%PDF-" not in content[:1024]:  # readers accept the header anywhere in the first 1024 bytes, and the trailer in the last
        raise UserError(f"--report {path}: is not a PDF (it does not begin with %PDF-)")
    if b"%%EOF" not in content[-1024:]:
        raise UserError(f"--report {path}: is not a whole PDF (%%EOF is missing at its end)")


def write_zip(handle, root, files, top):
    """Put files, relative to root, into one folder called top."""
    with zipfile.ZipFile(handle, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for relative in files:
            content = (root / relative).read_bytes()
            info = zipfile.ZipInfo.from_file(root / relative, f"{top}/{relative.as_posix()}", strict_timestamps=False)
            command = relative.suffix == ".sh" or content.startswith(b"#!")
            info.external_attr = (stat.S_IFREG | (0o755 if command else 0o644)) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)


def replace(target, write):
    """Let write(handle) make the file target, which appears whole or not at all."""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=".LAB4_", suffix=".part", dir=target.parent)
        try:
            with open(descriptor, "wb") as handle:
                write(handle)
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are private
            os.replace(temporary, target)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        source = error.filename and not str(error.filename).endswith(".part")
        raise UserError(f"{error.filename}: {error.strerror}" if source else
                        f"{target}: can't be written ({error.strerror}); expected room and permission there") from None


def plural(count, kind):
    return f"{count:,} {kind}" + ("" if count == 1 or kind == "CSV" else "es" if kind.endswith("x") else "s")


def build_parser():
    parser = Parser(prog="package.sh", description="Write LAB4_{STUDENT_ID}_{NAME}.zip, the hand-in, into the current folder.")
    parser.add_argument("student_id", metavar="STUDENT_ID", help="your student id")
    parser.add_argument("name", metavar="NAME", help="your name, in any script")
    parser.add_argument("--report", type=Path, metavar="FILE.pdf", help="the report: checked, and copied beside the zip under its name")
    return parser


def main():
    args = build_parser().parse_args()
    top = f"LAB4_{name_part(args.student_id, 'STUDENT_ID')}_{name_part(args.name, 'NAME')}"
    if len(f"{top}.zip".encode()) > LONGEST_NAME:
        raise UserError(f"NAME: the file name would have more than {LONGEST_NAME} bytes")
    if args.report:
        check_report(args.report)
    files, outside, strays = source_files(ROOT)
    for name in NEEDED:
        if Path(name) not in files:
            raise UserError(f"{ROOT / name}: is missing, and a hand-in needs it")

    target = Path.cwd() / f"{top}.zip"
    replace(target, lambda handle: write_zip(handle, ROOT, files, top))
    size = sum((ROOT / name).stat().st_size for name in files)
    print(f"{target.name}: {plural(len(files), 'file')}, {size / 1024:,.0f} KiB ({target.stat().st_size / 1024:,.0f} KiB packed)")
    if outside:
        print("left out: " + ", ".join(plural(count, kind) for kind, count in outside.most_common()))
    if strays:
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        print(f"not in the zip, though Python: {', '.join(strays[:5])}{more} (put a file beside Trainer.py to have it in)")
    if args.report:
        report = target.with_name(f"{top}.pdf")
        if not (report.exists() and report.samefile(args.report)):
            with open(args.report, "rb") as source:
                replace(report, lambda handle: shutil.copyfileobj(source, handle))
        print(f"{report.name}: the report, {report.stat().st_size / 1024:,.0f} KiB")


if __name__ == "__main__":
    run(main)
