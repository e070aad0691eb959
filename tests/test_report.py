"""scripts/make_report.py by its command line; the page in headless Chromium where there is one."""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager

import pytest
import report_frames
from PIL import Image
from conftest import ROOT, run_cli, run_main
from made_up import made_up_frame, make_gif, make_run, to_array
from test_figures import refused

SECTIONS = [
    "A. Introduction",
    "B.i ",
    "B.ii ",
    "B.iii ",
    "B.iv ",
    "C.i ",
    "C.ii ",
    "C.iii ",
    "C.iv ",
]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
DRIVER = shutil.which("chromedriver")
FRAMES = 45


def save_settings(run, **settings):
    import torch

    torch.save(
        {
            "state_dict": {},
            "last_epoch": 1,
            "args": {"num_epoch": 2, "seed": 0, "tfr": 1.0, "save_root": str(run), **settings},
        },
        run / "last.ckpt",
    )


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of three runs with frames and settings, made once: its folder."""
    root = tmp_path_factory.mktemp("report")
    runs = []
    for kind in ("Cyclical", "Monotonic", "<None> & co"):
        runs.append(make_run(root / kind, kind, epochs=8, frames=FRAMES, gif=True))
        save_settings(runs[-1], kl_anneal_type=kind, DR="/some/where/dance")
    result = run_cli("scripts/make_report.py", *runs, "-o", root / "out")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return root / "out"


def test_sections_of_the_rubric_and_room_for_analysis(report):
    page, text = (report / "report.html").read_text(), (report / "report.md").read_text()
    for section in SECTIONS:
        assert f">{section}" in page and re.search(f"^##+ {re.escape(section)}", text, re.M), (
            section
        )
    assert page.count('class="analysis"') == text.count("**Your text:**") == 9


def test_the_page_loads_nothing_and_is_small(report):
    page = (report / "report.html").read_text()
    assert len(page) < 10e6
    links = re.findall(r'(?:src|href|action|data)\s*=\s*"([^"]*)"|url\(([^)]*)\)|@import', page)
    assert all(a.startswith("data:") for a, _ in links) and links
    assert set(re.findall(r"https?://[^\s\"']+", page)) <= {
        "http://www.w3.org/2000/svg"
    }  # a name, not an address


def test_settings_that_differ_come_first_and_all_at_the_end(report):
    text = (report / "report.md").read_text()
    section = text.split("## C.ii")[1].split("## C.iii")[0]
    assert section.index("| `--kl_anneal_type` | Cyclical |") < section.index("loss_curves.png")
    assert (
        "`--seed`" not in section and "`--num_epoch 2` (70)" in section
    )  # the template's in brackets
    differs, equal = text.split("## Appendix")[1].split("What is equal in all runs:")
    assert "`--kl_anneal_type`" in differs and "`--seed`" not in differs
    assert "`--seed`" in equal and "`--kl_anneal_type`" not in equal
    assert "/some/where" not in text and "`--save_root`" not in text


def test_images_of_the_markdown_are_there(report):
    names = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", (report / "report.md").read_text())
    assert len(names) == 7 + 3 and all((report / name).is_file() for name in names)


def test_code_is_printed_open_with_file_and_line(report):
    page = (report / "report.html").read_text()
    assert "<details" not in page and "not found in this copy" not in page
    for name in (
        "VAE_Model.training_one_step",
        "VAE_Model.rollout",
        "Gaussian_Predictor.reparameterize",
        "teacher_forcing_ratio",
        "beta_at",
    ):
        file, line = re.search(
            rf"<code>{name}</code> in (\S+), line (\d+)</p><pre>def {name.split('.')[-1]}\(", page
        ).groups()
        assert (
            f"def {name.split('.')[-1]}(" in (ROOT / file).read_text().splitlines()[int(line) - 1]
        )


def test_each_section_has_its_own_runs(tmp_path):
    kl = [
        make_run(tmp_path / kind, kind, epochs=8, frames=20)
        for kind in ("Cyclical", "Monotonic", "None")
    ]
    tfr = [
        make_run(tmp_path / name, "None", epochs=8, frames=20, tfr=(start, 2, 0.5))
        for name, start in (("decay", 1), ("never", 0))
    ]
    out = tmp_path / "out"
    result = run_main(
        "make_report.py",
        "--best",
        kl[0],
        "--kl",
        *kl,
        "--tfr",
        *tfr,
        "-o",
        out,
        "--student_id",
        "313553009",
        "--name",
        "林于翔",
    )
    assert result.returncode == 0, result.stderr
    text, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    part = lambda first, last: text.split(f"## {first}")[1].split(f"## {last}")[0]
    assert "| decay |" in part("C.i ", "C.ii ") and "Cyclical" not in part("C.i ", "C.ii ")
    assert "| Monotonic |" in part("C.ii ", "C.iii ") and "never |" not in part("C.ii ", "C.iii ")
    assert "| Cyclical |" in part("C.iii ", "C.iv ") and "| Monotonic |" not in part(
        "C.iii ", "C.iv "
    )
    assert "| Cyclical | B, C.ii, C.iii, C.iv |" in text  # one run, several sections
    assert text.splitlines()[2] == "313553009 林于翔" and "313553009 林于翔</p>" in page
    assert "<title>LAB4_313553009_林于翔</title>" in page  # under which a browser saves its PDF


def test_runs_of_unequal_length_are_said_to_be(tmp_path):
    long = make_run(tmp_path / "long", "Cyclical", epochs=8, frames=5)
    short = make_run(tmp_path / "short", "Monotonic", epochs=3, frames=5)
    result = run_main("make_report.py", "--kl", long, short, "-o", tmp_path / "out")
    assert "unequal length (frames: long 144000, short 54000)" in result.stdout


def test_runs_that_were_the_same_are_said_to_be(tmp_path):
    one, two = (
        make_run(tmp_path / name, "Cyclical", epochs=8, frames=5) for name in ("one", "two")
    )
    result = run_main("make_report.py", "--kl", one, two, "-o", tmp_path / "out")
    assert "one and two had the same beta throughout" in result.stdout
    assert (
        "one and two had the same beta throughout" in (tmp_path / "out" / "report.md").read_text()
    )


def test_merged_neighbours_of_the_gif_are_counted_again(tmp_path):
    make_gif(tmp_path / "a.gif", 31)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames < 31
    frames = report_frames.read_rollout(tmp_path / "a.gif")
    assert frames.shape == (31, 32, 192, 3)
    for t in (0, 1, 2, 15, 16, 30):
        assert abs(frames[t].astype(int) - to_array(made_up_frame(t))).mean() < 8


def test_what_has_no_data_is_left_out_and_said(tmp_path):
    bare = make_run(tmp_path / "bare", epochs=1, psnr=False)
    name = "--student_id", 313553009, "--name", "Yu Hsiang Lin"
    result = run_main("make_report.py", bare, "-o", tmp_path / "out", *name)
    assert result.returncode == 0, result.stderr
    text, page = (
        (tmp_path / "out" / "report.md").read_text(),
        (tmp_path / "out" / "report.html").read_text(),
    )
    assert "313553009 Yu Hsiang Lin" in text and "LAB4_313553009_Yu_Hsiang_Lin" in page
    for unknown in ("In the template's recipe e is", "z comes from the prior"):
        assert unknown not in text
    for said in (
        "Settings of bare are not known",
        "psnr_per_frame: left out",
        "bare has no val_pred.gif",
    ):
        assert said in text and said in page
    assert 'id="player"' not in page and "psnr_per_frame.png" not in text

    other = make_run(tmp_path / "other", epochs=1, frames=40)
    make_gif(other / "val_pred.gif", 20)
    result = run_main("make_report.py", other, "-o", tmp_path / "out2")
    assert result.returncode == 0 and "not of the same rollout" in result.stdout


def test_text_of_the_writer_survives_a_second_report(tmp_path):
    run, out = make_run(tmp_path / "a", epochs=1, frames=3), tmp_path / "out"
    assert run_main("make_report.py", run, "-o", out).returncode == 0
    text = (out / "report.md").read_text()
    marker = text.index("(write here)", text.index("your analysis C.i:")) - 1
    mine = "The loss & its <jump>.\n\n**Two** lines, $a_1 * b_1$ and $c_1 * d$.\n\n"
    mine += "| a | b |\n| --- | --- |\n| 1 | 2 |\n\n![mine](val_psnr.png) ![](我的圖.png)"
    shutil.copy(out / "val_psnr.png", out / "我的圖.png")
    (out / "report.md").write_text(text[:marker] + mine + text[marker + len("*(write here)*") :])
    page = (out / "report.html").read_text()
    (out / "report.html").write_text(
        page.replace('<html lang="en">', '<html lang="en" data-edited="1">')
    )
    result = run_main("make_report.py", run, "-o", out)
    assert result.returncode == 0, result.stderr
    assert mine in (out / "report.md").read_text()
    rendered = (out / "report.html").read_text().split('data-key="C.i"')[1].split("</div>")[0]
    assert (
        "The loss &amp; its &lt;jump&gt;.</p>" in rendered
        and "<strong>Two</strong> lines" in rendered
    )
    assert "$a_1 * b_1$" in rendered and "<em>" not in rendered
    assert (
        '<td data-column="b">2</td>' in rendered
        and rendered.count('<img src="data:image/png;base64,') == 2
    )
    assert (
        "data-edited" in (out / "report_edited_1.html").read_text()[:200]
        and "report_edited_1.html" in result.stdout
    )


def test_without_the_markdown_library_the_text_stands_as_it_is(tmp_path):
    run, out = make_run(tmp_path / "a", epochs=1, frames=3), tmp_path / "out"
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "markdown_it.py").write_text("raise ImportError")
    assert run_main("make_report.py", run, "-o", out).returncode == 0
    text = (out / "report.md").read_text()
    (out / "report.md").write_text(text.replace("*(write here)*", "A **bold** <claim>."))
    result = run_cli(
        "scripts/make_report.py", run, "-o", out, env={"PYTHONPATH": str(tmp_path / "none")}
    )
    assert result.returncode == 0 and "pip install markdown-it-py" in result.stdout
    assert (out / "report.html").read_text().count(">A **bold** &lt;claim&gt;.</div>") == 9


def test_a_report_changed_elsewhere_is_kept_beside_the_new_one(tmp_path):
    run, out = make_run(tmp_path / "a", epochs=1, frames=3), tmp_path / "out"
    for _ in range(2):
        assert run_main("make_report.py", run, "-o", out).returncode == 0
    assert not list(out.glob("report_edited*"))  # nobody wrote anything
    text = (out / "report.md").read_text().replace("**Your text:**", "**Your text:** it works", 1)
    (out / "report.md").write_text(text)
    result = run_main("make_report.py", run, "-o", out)
    assert result.returncode == 0 and "report_edited_1.md" in result.stdout
    assert (out / "report_edited_1.md").read_text() == text and "it works" not in (
        out / "report.md"
    ).read_text()


def test_user_errors_are_one_line_and_write_nothing(tmp_path):
    run, out = make_run(tmp_path / "a", epochs=1, frames=3), tmp_path / "out"
    refused(run_cli("scripts/make_report.py", tmp_path / "absent", "-o", out), "absent")
    refused(run_main("make_report.py", "-o", out), "RUN")
    refused(run_main("make_report.py", "--kl", run, run, "-o", out), "--kl", "twice")
    refused(run_main("make_report.py", run, "-o", out, "--name", "a/b"), "--name")
    (run / "last.ckpt").write_bytes(b"PK nothing")
    refused(run_main("make_report.py", run, "-o", out), "last.ckpt")
    (run / "last.ckpt").unlink()
    (run / "val_pred.gif").write_bytes(b"GIF89a")
    refused(run_main("make_report.py", run, "-o", out), "val_pred.gif")
    (run / "val_pred.gif").unlink()
    (run / "history.csv").write_text("epoch\n")
    refused(run_main("make_report.py", run, "-o", out), "history.csv")
    assert not out.exists()


# ---------------------------------------------------------------- in a browser


@contextmanager
def browser(folder, url):
    """A page in headless Chromium, by chromedriver's plain HTTP: call(method, path, body)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # a proxy of the machine is not for 127.0.0.1

    def call(method, path, body=None):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
        )
        with direct.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    session = None
    try:
        for _ in range(100):
            try:
                call("GET", "/status")
                break
            except OSError:
                time.sleep(0.1)
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
            "--disable-background-networking "
            "--disable-component-update --disable-sync --window-size=1100,1000"
        ).split()
        options = {"binary": CHROMIUM, "args": [*flags, f"--user-data-dir={folder / 'profile'}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = (
            "/session/"
            + call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        )
        call("POST", session + "/url", {"url": url})
        yield lambda method, path, body=None: call(method, session + path, body)
    finally:
        if session:
            call("DELETE", session)
        driver.terminate()
        driver.wait(timeout=20)


LOOK = """
const canvas = document.querySelectorAll('#player canvas');
const cursor = document.getElementById('cursor');
const box = document.getElementById('plot').getBoundingClientRect();
return {frame: +document.getElementById('frame').value,
        said: document.getElementById('where').textContent,
        cursor: +cursor.getAttribute('x1'),
        readouts: [...document.querySelectorAll('#player output')].map(o => o.textContent),
        images: [...canvas].map(c => c.toDataURL()),
        box: [box.left, box.top, box.width, box.height],
        wide: +document.getElementById('plot').getAttribute('viewBox').split(' ')[2]};
"""


def mean_difference(url, image):
    shown = to_array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))
    return abs(shown - to_array(image)).mean()


class Player:
    """The player of a report page in a browser; `call` is that of `browser`."""

    left, right, home = "\ue012", "\ue014", "\ue011"

    def __init__(self, call, psnr):
        self.call, self.psnr = call, psnr
        until = time.monotonic() + 20
        while self.script("return document.getElementById('player').dataset.ready") != "1":
            assert time.monotonic() < until, "the player did not start"
            time.sleep(0.1)

    def script(self, text):
        return self.call("POST", "/execute/sync", {"script": text, "args": []})

    def click(self, selector):
        self.script(f"document.querySelector({json.dumps(selector)}).click()")

    def focus(self, selector):
        self.script(f"document.querySelector({json.dumps(selector)}).focus()")

    def act(self, kind, actions):
        self.call("POST", "/actions", {"actions": [{"type": kind, "id": kind, "actions": actions}]})

    def keys(self, *names):
        self.act("key", [{"type": kind, "value": name}
                         for name in names for kind in ("keyDown", "keyUp")])

    def move_slider(self, frame):
        self.script(f"const s = document.getElementById('frame'); s.value = {frame}; "
                    "s.dispatchEvent(new Event('input'))")

    def drag_to(self, x, y):
        self.act("pointer", [{"type": "pointerMove", "x": x - 200, "y": y + 200},
                             {"type": "pointerMove", "x": x - 100, "y": y},
                             {"type": "pointerDown", "button": 0},
                             {"type": "pointerMove", "x": x, "y": y},
                             {"type": "pointerUp", "button": 0}])

    def expect(self, frame):
        """Check number, cursor, PSNR and images of a frame. Returns what is seen."""
        seen = self.script(LOOK)
        assert seen["frame"] == frame and seen["said"].startswith(f"frame {frame} of {FRAMES}")
        # frames 0 (given) to FRAMES lie evenly between the plot's margins
        cursor = 46 + (seen["wide"] - 46 - 14) * frame / FRAMES
        assert seen["cursor"] == pytest.approx(cursor, abs=0.01)
        decibel = f"{self.psnr['Cyclical'][frame]:.2f} dB" if frame else "\u2013"
        assert seen["readouts"][0] == decibel
        width = made_up_frame(frame).width // 3
        for part, url in enumerate(seen["images"]):
            box = part * width, 0, (part + 1) * width, 32
            own = mean_difference(url, made_up_frame(frame).crop(box))
            other = mean_difference(url, made_up_frame(frame + 7).crop(box))
            assert own < 8 and own < other, f"image {part} is not of frame {frame}"
        return seen


@pytest.fixture
def player(report, tmp_path):
    """The player of the report's page; the browser reports no problem and loads nothing."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    psnr = {}
    for name in ("Cyclical", "Monotonic"):
        lines = (report.parent / name / "psnr_per_frame.csv").read_text().splitlines()[1:]
        psnr[name] = {int(line.split(",")[0]): float(line.split(",")[1]) for line in lines}
    with browser(tmp_path, (report / "report.html").as_uri()) as call:
        player = Player(call, psnr)
        yield player
        loaded = ("return performance.getEntriesByType('resource')"
                  ".filter(e => !e.name.startsWith('data:')).length")
        assert player.script(loaded) == 0
        log = call("POST", "/se/log", {"type": "browser"})
        assert not [entry["message"] for entry in log if entry["level"] == "SEVERE"]
        player.script("window.onbeforeunload = null; unsaved = false")


def test_slider_and_arrow_keys_step_frames(player):
    player.expect(1)
    player.move_slider(30)
    player.expect(30)
    player.keys(player.right, player.right)  # the page has the keyboard
    player.expect(32)
    player.keys(player.left)
    player.expect(31)
    player.focus("#frame")
    player.keys(player.left)  # the slider has it: one step, not two
    player.expect(30)
    player.keys(player.home)
    player.expect(0)


def test_dragging_in_the_plot_moves_the_frame_and_selects_no_text(player):
    player.script("document.getElementById('plot').scrollIntoView({block: 'center'})")
    seen = player.expect(1)
    (left, top, width, height), wide = seen["box"], seen["wide"]
    x = left + width * (46 + (wide - 46 - 14) * 20 / FRAMES) / wide
    player.drag_to(round(x), round(top + height / 2))
    player.expect(20)
    assert player.script("return getSelection().toString()") == ""


def test_play_moves_frames_and_another_run_shows_its_psnr(player):
    player.click("#play")
    time.sleep(0.5)
    player.click("#play")
    paused = player.script(LOOK)["frame"]
    assert paused != 1
    time.sleep(0.3)
    player.expect(paused)
    player.script("document.querySelectorAll('#player input[type=radio]')[1].click()")
    assert player.script(LOOK)["readouts"][1] == f"{player.psnr['Monotonic'][paused]:.2f} dB"


def test_typed_text_is_kept_and_its_arrow_keys_step_no_frame(player):
    player.focus('.analysis[data-key="C.i"]')
    player.keys("h", "i", player.left)
    text = "return document.querySelector('.analysis[data-key=\"C.i\"]').textContent"
    assert player.script(text) == "hi"
    assert player.script(LOOK)["frame"] == 1
    page = player.script("return document.documentElement.outerHTML.slice(0, 200)")
    assert 'data-edited="1"' in page


FITS = """
const page = document.documentElement, rect = e => e.getBoundingClientRect();
const plot = rect(document.getElementById('plot'));
const outside = [...document.querySelectorAll('#plot text')].filter(t => {
  const box = rect(t);
  return box.left < plot.left || box.right > plot.right
      || box.bottom > plot.bottom || box.top < plot.top;
}).map(t => t.textContent);
const over = [...document.querySelectorAll('main *')].filter(e =>
  e.scrollWidth > e.clientWidth + 1 && e.clientWidth > 0
  && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)).map(e => e.outerHTML.slice(0, 80));
const canvas = document.querySelector('#player canvas');
return {scrolls: page.scrollWidth - page.clientWidth, outside, over, plot: plot.width,
  slider: rect(document.getElementById('frame')).width,
  canvas: [rect(canvas).width / canvas.width, getComputedStyle(canvas).imageRendering]};
"""


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
@pytest.mark.parametrize("width", [420, 1200])
def test_the_page_fits_its_window(report, tmp_path, width):
    with browser(tmp_path, (report / "report.html").as_uri()) as call:
        call(
            "POST",
            "/goog/cdp/execute",
            {
                "cmd": "Emulation.setDeviceMetricsOverride",
                "params": {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
            },
        )
        until = time.monotonic() + 60
        while (
            call(
                "POST",
                "/execute/sync",
                {"script": "return document.getElementById('player').dataset.ready", "args": []},
            )
            != "1"
        ):
            assert time.monotonic() < until, "the player did not start"
            time.sleep(0.1)
        time.sleep(0.5)  # the plot follows the window
        seen = call("POST", "/execute/sync", {"script": FITS, "args": []})
    assert seen["scrolls"] <= 0 and not seen["over"] and not seen["outside"], seen
    assert seen["slider"] == pytest.approx(seen["plot"], abs=4)
    assert seen["canvas"] == [4, "pixelated"]
