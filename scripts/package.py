"""Write LAB4_{STUDENT_ID}_{NAME}.zip, the submission; scripts/package.sh finds the Python for it.

    bash scripts/package.sh 313553009 林于翔 --report my_report.pdf

What goes in is on a list: what Trainer.py, Tester.py and the scripts need to run, and your own
Python files and packages. Whatever else lies in the working folder stays out: documents, tests,
data sets, images, checkpoints, outputs of runs, caches, environments, other zips.
"""

import os
import re
import stat
import sys
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from utils.cli import Parser, UserError, plural, run  # noqa: E402
from utils.files import atomic, copy_file  # noqa: E402

TOP_FILES = {"README.md", "LICENSE", "requirements.txt"}  # and every *.py
SUFFIXES = {"modules": {".py"}, "utils": {".py"}, "scripts": {".py", ".sh", ".html"}}
NOT_PACKED = {"docs", "test", "tests"}  # also where they are packages
NOT_NEEDED = {"scripts/test.sh"}  # runs the tests
NEEDED = ["Trainer.py", "Tester.py", "dataloader.py", "requirements.txt"]
NEEDED += [f"modules/{name}.py" for name in ("__init__", "layers", "modules")]
LARGEST = 2 * 2**20  # bytes; no source file comes near, but an output with its name does

CACHES = {"__pycache__", "node_modules"}
KINDS = {
    "image": ".png .gif .jpg .jpeg .webp .bmp .svg .pdf .mp4",
    "weights or checkpoint": ".ckpt .pt .pth .bin .safetensors .npy .npz .pkl .onnx",
    "CSV": ".csv",
    "archive": ".zip .tar .gz .tgz .bz2 .xz .7z .rar .part",
    "cache": ".pyc .pyo",
}
KIND_OF = {suffix: kind for kind, suffixes in KINDS.items() for suffix in suffixes.split()}

FORBIDDEN = '/\\:*?"<>|'  # in no file name on Linux, macOS or Windows, where a grader may unpack
LONGEST_NAME = 255  # bytes, of one file name


def name_part(text, what):
    """Return the student's id or name as it goes into the file name: underscores for spaces."""
    text = unicodedata.normalize("NFC", text).strip()
    if not text:
        raise UserError(f"{what}: is empty; expected it as it goes into the file name")
    for char in text:
        if char in FORBIDDEN or unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"):
            raise UserError(f"{what} {text!a}: {char!a} cannot be in a file name")
    return re.sub(r"\s+", "_", text)


def folder_kind(path):
    """Return what a folder that is left out whole is, or None."""
    if path.name == ".git":
        return "git folder"
    if (path / "pyvenv.cfg").exists() or (path / "conda-meta").exists() or path.name == ".venv":
        return "virtual environment"
    if path.name in CACHES or path.name.startswith("."):
        return "cache"
    return None


def is_source(path, package_folders):
    """Return whether a file, by its path relative to the root, belongs to the source."""
    top, suffix = path.parts[0], path.suffix
    if len(path.parts) == 1:
        return suffix == ".py" or path.name in TOP_FILES
    if path.as_posix() in NOT_NEEDED:
        return False
    return suffix in SUFFIXES.get(top, {".py"} if top in package_folders else ())


def imported(root, files):
    """Return the full names of the modules that Python files, relative to the root, import."""
    return {module for name in files for module in re.findall(
        r"^\s*(?:from|import)\s+(\w[\w.]*)", (root / name).read_text("utf-8", "replace"), re.M)}


def find_packages(root):
    """Return the user's own folders that are packages, or that a file beside them imports."""
    files = [path for path in root.glob("*.py") if path.is_file()]
    tops = {module.split(".")[0] for module in imported(root, files)}
    tops = {top for top in tops if top and any((root / top).glob("*.py"))}  # no __init__.py needed
    return (tops | {path.parent.name for path in root.glob("*/__init__.py")}) - NOT_PACKED


def source_files(root):
    """Return (the files that go in, sorted; how many of each kind stay out; Python among those)."""
    package_folders = find_packages(root)
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
            source = is_source(relative, package_folders)
            if source and path.is_file() and path.stat().st_size <= LARGEST:
                inside.append(relative)
                continue
            outside[KIND_OF.get(path.suffix.lower(), "other file")] += 1
            if path.suffix == ".py" and relative.parts[0] not in NOT_PACKED:
                strays.append(relative.as_posix())
    return sorted(inside), outside, sorted(strays)


def check_complete(root, files):
    """Raise UserError where a file is missing that the commands need."""
    needed = list(NEEDED)
    for module in sorted(imported(root, [name for name in files if name.suffix == ".py"])):
        path = Path(*module.split("."))
        if path.parts[0] in SUFFIXES and len(path.parts) > 1 and not (root / path).is_dir():
            needed.append(f"{path.as_posix()}.py")
    for name in needed:
        if Path(name) not in files:
            raise UserError(f"{root / name}: is missing, and the submission needs it")


def check_report(path):
    """Raise UserError unless path is a whole PDF."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"--report {path}: cannot be read ({error.strerror})") from None
    if not content:
        raise UserError(f"--report {path}: is empty")
    # readers accept the header anywhere in the first 1024 bytes, and the trailer in the last
    if b"%PDF-" not in content[:1024]:
        raise UserError(f"--report {path}: is not a PDF (it does not begin with %PDF-)")
    if b"%%EOF" not in content[-1024:]:
        raise UserError(f"--report {path}: is not a whole PDF (%%EOF is missing at its end)")


def write_zip(target, root, files, top):
    """Put files, relative to root, into a folder called top in a zip, which appears when whole."""
    try:
        contents = [(root / name).read_bytes() for name in files]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
    with atomic(target) as aside, zipfile.ZipFile(aside, "w", compresslevel=9) as archive:
        for name, content in zip(files, contents):
            info = zipfile.ZipInfo.from_file(root / name, f"{top}/{name.as_posix()}",
                                             strict_timestamps=False)
            command = name.suffix == ".sh" or content.startswith(b"#!")
            info.external_attr = (stat.S_IFREG | (0o755 if command else 0o644)) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)


def build_parser():
    parser = Parser(prog="package.sh", description="Write LAB4_{STUDENT_ID}_{NAME}.zip, the "
                                                   "submission, into the current folder.")
    parser.add_argument("student_id", metavar="STUDENT_ID", help="your student id")
    parser.add_argument("name", metavar="NAME", help="your name, in any script")
    parser.add_argument("--report", type=Path, metavar="FILE.pdf",
                        help="the report: checked, and copied beside the zip under its name")
    return parser


def main():
    args = build_parser().parse_args()
    parts = name_part(args.student_id, "STUDENT_ID"), name_part(args.name, "NAME")
    top = "_".join(("LAB4", *parts))
    if len(f"{top}.zip".encode()) > LONGEST_NAME:
        raise UserError(f"NAME: the file name would have more than {LONGEST_NAME} bytes")
    if args.report:
        check_report(args.report)
    files, outside, strays = source_files(ROOT)
    check_complete(ROOT, files)
    for what, given, part in zip(("STUDENT_ID", "NAME"), (args.student_id, args.name), parts):
        if re.search(r"\s", given.strip()):
            print(f"{what} {given.strip()}: written as {part}, spaces being underscores in the "
                  f"assignment's form")

    target = Path.cwd() / f"{top}.zip"
    write_zip(target, ROOT, files, top)
    size = sum((ROOT / name).stat().st_size for name in files)
    print(f"{target.name}: {plural(len(files), 'file')}, {size / 1024:,.0f} KiB "
          f"({target.stat().st_size / 1024:,.0f} KiB packed)")
    if outside:
        print("left out:", ", ".join(plural(count, kind) for kind, count in outside.most_common()))
    if strays:
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        print(f"not in the zip, though Python: {', '.join(strays[:5])}{more} "
              f"(put a file beside Trainer.py to have it in)")
    if args.report:
        report = target.with_name(f"{top}.pdf")
        if not (report.exists() and report.samefile(args.report)):
            copy_file(args.report, report)
        print(f"{report.name}: the report, {report.stat().st_size / 1024:,.0f} KiB")


if __name__ == "__main__":
    run(main)
