"""The page of many runs: its data, what is left out, and its behaviour in a browser."""

import base64
import functools
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report.test_tables import recorded
from sklearn.metrics import roc_auc_score
from support import composed

from blemish import draw
from blemish.draw import choose, file_names
from blemish.edge.calibration import p_values
from blemish.edge.errors import InputError
from blemish.edge.selection import false_alarm_bounds
from blemish.files import picture_info, write_csv, write_json
from blemish.report.gallery import panel_boxes, places, regions_of, strips_of
from blemish.report.page import CURVES, certificate_of, write
from blemish.report.runs import ScoredImage, read, read_scores, scan
from blemish.run.evaluate import SCORES
from blemish.run.record import environment
from blemish.run.train import train

HOSTILE = "</script><img src=x onerror=window.hit=1>"
BUDGET = {"max_mb": 16, "images": 3, "picture_px": 96}
METHODS = ("padim", "patchcore", "reverse_distillation")
machine = functools.cache(environment)


@functools.cache
def strip_of(method, category, key, label):
    """A strip as a run draws it: one image for all methods, a map for each."""
    random = np.random.default_rng(list((category + key).encode()))
    image = random.integers(60, 200, (8, 8, 1), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1).repeat(3, axis=2)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16, 8:20] = label
    values = np.random.default_rng(list((method + category + key).encode())).random((8, 8)).repeat(4, axis=0).repeat(4, axis=1) + 2.0 * mask
    return draw.strip(image, mask, values, (0.0, 2.5, 3.0), 2.5, draw.caption(key, "hole", label, 1.0, None))


def run_folder(folder, method="padim", category="screw", seed=0, status="finished", skill=2.0, pictures=4, n=24, curves=True, **metadata):
    """A run folder with random scores: half of the n images are anomalous, `skill` σ above the others."""
    random = np.random.default_rng(list(f"{method}{category}{seed}".encode()))
    label = np.arange(n) % 2
    difficulty = np.random.default_rng(list(str(category).encode())).normal(size=n)
    score = 5 + skill * label + 0.6 * difficulty + 0.6 * random.normal(size=n)
    kinds = ["hole" if one else "good" for one in label]
    tested = [ScoredImage(f"test/{kind}/{index:03}.png", kind) for index, kind in enumerate(kinds)]
    kept = choose(tested, pictures)
    names = file_names({key: defect for key, defect in tested if key in kept})
    metadata = {
        "scale": (0.0, 2.5, 3.0),
        "calibration": {"map_value": 2.5},
        "truth": "pixel masks",
        "command": "tools/train.py",
        **metadata,
    }
    metadata |= {"status": status, "started": f"2026-01-0{1 + seed}", "pictures": [f"images/{name}" for name in names.values()]}
    recorded(folder, method, category, seed, 0.5, **{"environment": machine(), "error": None, **metadata})
    (folder / "config.yaml").write_text(f"seed: {seed}\nmodel:\n  _target_: blemish.methods.{method}.Method\ndata:\n  category: screw\n")
    if status != "finished":
        return folder
    area = roc_auc_score(label, score)
    figures = {"image_auroc": area, "image_ap": area**1.1, "image_f1_max": area**1.3, "pixel_auroc": area**0.5, "pixel_ap": area**3}
    costs = {"fit_seconds": 3.0 * len(method) + random.random(), "test_seconds": 0.2 * len(method) ** 2 + random.random(), "images": n}
    figures["aupro"] = area**2
    write_json(folder / "metrics.json", {**figures, **costs, "defects": {"hole": {"images": n // 2, **figures}}})
    columns = zip(tested, label.tolist(), score.tolist(), strict=True)
    write_csv(folder / "scores.csv", SCORES, [(key, kind, of, 6.0, int(of > 6), 0.5, defect) for (key, defect), kind, of in columns])
    if curves:
        x = np.linspace(0, 1, 200)
        pixel = {"roc": np.c_[x, x**0.1], "pr": np.c_[x, 1 - x**3], "pro": np.c_[0.3 * x, x**0.3]}
        write_json(folder / "curves.json", {"image": {"roc": np.c_[x, x**0.2], "pr": np.c_[x, 1 - x**4]}, "pixel": pixel})
    (folder / "images").mkdir()
    for key, name in names.items():
        strip = strip_of(method, category, key, int("hole" in key))
        strip.save(folder / "images" / name, compress_level=1, pnginfo=picture_info(strip.info["Panels"]))
    return folder


def inside(page):
    """The data in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


def test_the_page_tells_of_regions_and_of_drift(tmp_path):
    """A strip with regions, and a monitor with an alarm on the same calibration scores: both reach the page, damaged ones do not."""
    calibration = {"map_value": 2.5, "n": 40, "promise": "split", "value": 6.0, "region_levels": [3.0, 2.0], "digest": "abc"}
    folder = run_folder(tmp_path / "runs" / "a", calibration=calibration)
    run = read(folder, "a")
    strip, steps = strip_of("padim", "screw", "x", 1), [[3.5, [[1, 2, 3, 4]]], [2.5, [[1, 2, 3, 4], [5, 6, 7, 8]]], [1.0, []]]
    for text, bounds in ((json.dumps(steps), [0, 1, None]), (None, None), ("{", None), ("[[1,[[2]]]]", None), ("[]", None)):
        strip.save(tmp_path / "strip.png", pnginfo=picture_info(strip.info["Panels"], text))
        with Image.open(tmp_path / "strip.png") as file:
            found = regions_of(file, run)
        assert (found and [step[1] for step in found["steps"]]) == bounds
    for name, alarm in (("early", {"score": 9, "time": "2026-01-02"}), ("late", {"time": "2026-02-02"}), ("none", None), ("odd", 3)):
        write_json(tmp_path / "runs" / name / "monitor.json", {"calibration": "abc", "test": {"alarm": alarm}})
    (found,) = scan(tmp_path / "runs")
    assert found.drift == "2026-01-02"


def test_a_run_tells_what_any_threshold_promises(tmp_path):
    folder = run_folder(tmp_path / "a", calibration={"map_value": 2.5, "n": 40, "promise": "split", "value": 6.0})
    scores = read_scores(folder / "scores.csv")
    assert certificate_of(read(folder, "a")) is None, "p-values that are not of 40 images"
    p = p_values(scores.score, np.linspace(3, 7, 40))
    rows = zip(scores.images, scores.label.tolist(), scores.score.tolist(), p.tolist(), strict=True)
    write_csv(folder / "scores.csv", SCORES, [(key, kind, of, 6.0, int(of > 6), value, defect) for (key, defect), kind, of, value in rows])
    found = certificate_of(read(folder, "a"))
    assert (found["images"], found["n"]) == (24, 40) and len(found["steps"]) == 24
    expected = false_alarm_bounds(scores.score, p, 40)[np.argsort(-scores.score)]
    assert [step[1:3] for step in found["steps"]] == [[i + 1, bound] for i, bound in enumerate(expected.tolist())]
    assert found["steps"][-1][3] == 12
    for other in ({"promise": "full"}, {"promise": "cross"}, {"n": None}):
        assert certificate_of(read(run_folder(tmp_path / str(other), calibration={"n": 40, "promise": "split", **other}), "b")) is None


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-1, 1)), max_size=30))
def test_places_are_shares_of_pairs_in_order(rows):
    score, label = (np.array([row[column] for row in rows], float) for column in (0, 1))
    found = places(score, label)
    for own, kind, place in zip(score, label, found, strict=True):
        sign, others = (1, score[label == 0]) if kind == 1 else (-1, score[label == 1])
        if kind == -1 or len(others) == 0:
            assert np.isnan(place)
        else:
            assert place == pytest.approx(np.mean([(sign * own > sign * of) + 0.5 * (own == of) for of in others]))
    if {0, 1} <= set(label.tolist()):
        for kind in (0, 1):
            assert found[label == kind].mean() == pytest.approx(roc_auc_score(label[label >= 0], score[label >= 0]))


@pytest.mark.parametrize(("height", "width", "again", "mapped"), [(60, 700, False, True), (64, 64, True, True), (64, 64, True, False)])
def test_panels_are_where_the_strip_states_them(height, width, again, mapped, tmp_path):
    random = np.random.default_rng(0)
    image = random.integers(0, 255, (height, width, 3), dtype=np.uint8)
    mask = (random.random((height, width)) > 0.5).astype(np.uint8)
    values, scale = (random.random((height, width)), (-0.25, 0.5, 2000.5)) if mapped else (None, None)
    drawn = draw.strip(image, mask, values, scale, 1.5, "title\ntext", image[::-1] if again else None)
    drawn.save(tmp_path / "strip.png", pnginfo=picture_info(drawn.info["Panels"]))
    size = draw.panel_size(height, width)
    expected = {"input": draw._sized(image, size), "ground truth": draw._sized(draw.GROUND[mask], size)}
    if again:
        expected["reconstruction"] = draw._sized(image[::-1], size)
    if mapped:
        expected["map"] = draw._sized(draw.colour(values, scale), size)
        expected["overlay"] = draw.overlay(image, values, scale, 1.5, mask, size)
    with Image.open(tmp_path / "strip.png") as strip:
        boxes = panel_boxes(strip)
        assert boxes.keys() == expected.keys()
        for name, picture in expected.items():
            np.testing.assert_array_equal(np.asarray(strip.crop(boxes[name])), np.asarray(picture))


@pytest.mark.parametrize(
    "stated", [None, "{", "3", '{"map": 1}', '{"map": [0, 0, 9]}', '{"map": [0, 0, 99999, 9]}', '{"map": ["", 0, 9, 9]}']
)
def test_a_picture_that_is_no_strip_is_not_taken_apart(stated):
    picture = Image.new("RGB", (1140, 347))
    picture.info |= {} if stated is None else {"Panels": stated}
    assert panel_boxes(picture) is None


def test_strips_are_told_from_their_namesakes(tmp_path):
    folder = run_folder(tmp_path / "run", pictures=0)
    keys = [f"{place}/{index}.png" for place in "ab" for index in range(3)]
    write_csv(folder / "scores.csv", SCORES, [(key, 1, 0.5, "", "", "", "hole") for key in keys])
    record = json.loads((folder / "record.json").read_text())
    names = [f"images/hole_{index}{end}.png" for end in ("", "-2") for index in range(3)]
    write_json(folder / "record.json", {**record, "pictures": names})
    assert strips_of(scan(tmp_path)[0]) == dict(zip(keys, names, strict=True))
    write_json(folder / "record.json", {**record, "pictures": ["images/hole_1.png"]})  # not the one that would be chosen
    assert strips_of(scan(tmp_path)[0]) == {}  # of a or of b?


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """3 methods × 2 categories × 2 seeds, a third category that one method lacks, and runs that ended badly; one category is hostile."""
    folder = tmp_path_factory.mktemp("runs")
    for skill, method in enumerate(METHODS):
        for place, category in enumerate(("screw", "bottle", HOSTILE)):
            for seed in (0, 1):
                if (method, place) != ("padim", 2):
                    run_folder(folder / method / str(place) / str(seed), method, category, seed, skill=0.7 + skill, curves=seed == 0)
    run_folder(folder / "clean", "padim", "screw", 0, protocol="clean", variant=HOSTILE, epochs=3)
    run_folder(folder / "failed", "vae", "screw", 0, status="failed", error={"type": "RuntimeError", "message": HOSTILE})
    run_folder(folder / "running", "vae", "bottle", 0, status="running")
    (folder / "broken").mkdir()
    (folder / "broken" / "record.json").write_text("{")
    shutil.copytree(folder / "clean", folder / "clean" / "retest")
    return folder


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("page") / "report.html"
    assert write(runs, output, **BUDGET) == 20
    return output


def test_settings_are_pooled_over_seeds_and_ranked_only_with_their_like(runs, page):
    def figure(method, place, seed):
        return json.loads((runs / method / place / seed / "metrics.json").read_text())["image_auroc"]

    data = inside(page)
    statuses = [run["record"]["status"] for run in data["runs"]]
    assert {status: statuses.count(status) for status in statuses} == {"finished": 17, "failed": 1, "running": 1, "unreadable": 1}
    assert len(data["settings"]) == 9
    screw = next(of for of in data["settings"] if (of["method"], of["category"], of["protocol"]) == ("padim", "screw", "paper"))
    figures = [figure("padim", "0", seed) for seed in "01"]
    assert screw["seeds"] == [0, 1]
    assert screw["values"]["image_auroc"] == pytest.approx([np.mean(figures), np.std(figures, ddof=1)])
    together = [{data["settings"][id]["protocol"] for id in group["settings"]} for group in data["groups"]]
    assert sorted(map(sorted, together)) == [["clean"], ["paper"], ["paper"], ["paper"]]
    # only settings that were run on all three categories have a mean over them
    assert [of["method"] for of in data["means"]] == ["patchcore", "reverse_distillation"]
    by_seed = [np.mean([figure("patchcore", place, seed) for place in "012"]) for seed in "01"]
    assert data["means"][0]["values"]["image_auroc"] == pytest.approx([np.mean(by_seed), np.std(by_seed, ddof=1)])
    assert [(note["categories"], note["full_pass"], note["partial"]) for note in data["notes"]] == [(3, 2, 1)]


def test_curves_come_from_the_file_or_from_the_scores(page):
    for run in inside(page)["runs"]:
        if run["record"]["status"] == "finished":
            seed = run["record"]["seed"]
            assert set(run["curves"]) == (set(CURVES) if seed == 0 else {"image_roc", "image_pr"})
            x, y = np.array(run["curves"]["image_roc"]).reshape(-1, 2).T / 1000
            area = 1 / 1.2 if seed == 0 else run["metrics"]["image_auroc"]
            assert abs(np.trapezoid(y, x) - area) < 0.01


def test_the_gallery_ranks_by_place_over_the_settings(runs, page):
    data = inside(page)
    group = next(of for of in data["groups"] if of["category"] == "screw" and of["protocol"] == "paper")
    gallery = data["galleries"][group["id"]]
    found = [run for run in scan(runs) if run.record.get("category") == "screw" and run.record.get("protocol") == "paper" and run.scores]
    by_method = [
        np.mean([places(run.scores.score, run.scores.label) for run in found if run.record["method"] == method], axis=0)
        for method in METHODS
    ]
    tested = [image.key for image in found[0].scores.images]
    mean, spread = (dict(zip(tested, of(by_method, axis=0), strict=True)) for of in (np.mean, np.std))
    keys = {name: [gallery["images"][index]["key"] for index in of] for name, of in gallery["lists"].items()}
    assert (gallery["drawn"], gallery["tested"]) == (4, 24)
    for name, worth in (("best", mean.get), ("worst", lambda key: -mean[key]), ("disputed", spread.get)):
        np.testing.assert_allclose([worth(key) for key in keys[name]], sorted(map(worth, strips_of(found[0])), reverse=True)[:3])
    for image in gallery["images"]:
        panels = {name: set(of) for name, of in image["panels"].items()}
        assert panels == {"image": {"input", "truth"}, **{str(id): {"map", "overlay"} for id in group["settings"]}}
    assert data["left_out"] == {"images": 0, "of": sum(len(of["images"]) for of in data["galleries"]), "unread": 0}


def test_nothing_in_a_run_folder_becomes_markup_and_only_this_script_may_run(page):
    text = page.read_text()
    assert HOSTILE not in text
    assert "<img" not in text.replace('h("img"', "")
    assert text.count("</script>") == 2
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text)[1]
    for kind in ("script", "style"):
        code = re.search(rf"<{kind}>(.*?)</{kind}>", text, re.S)[1]
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", text)
    assert HOSTILE in json.dumps(inside(page))  # printed as text


def test_the_page_keeps_to_its_size_and_states_what_is_left_out(runs, page, tmp_path):
    write(runs, tmp_path / "none.html", **{**BUDGET, "images": 0})
    assert inside(tmp_path / "none.html")["media"] == {}
    bare, full, of = (tmp_path / "none.html").stat().st_size, page.stat().st_size, inside(page)["left_out"]["of"]
    most = bare + 0.6 * (full - bare)
    write(runs, tmp_path / "small.html", **{**BUDGET, "max_mb": most / 1e6})
    assert bare < (tmp_path / "small.html").stat().st_size <= most
    data = inside(tmp_path / "small.html")
    shown = sum(len(of["images"]) for of in data["galleries"])
    assert 0 < shown < of
    assert data["left_out"]["images"] == of - shown
    # the first of every list goes before the second of any
    assert all(len(gallery["images"]) > 0 for gallery in data["galleries"])


def test_damaged_folders_are_listed_and_pictures_stay_inside_their_run(tmp_path):
    Image.new("RGB", (1140, 347), "red").save(tmp_path / "secret.png")
    folder = run_folder(tmp_path / "runs" / "a")
    record = json.loads((folder / "record.json").read_text())
    names = record["pictures"]
    (folder / names[0]).write_bytes(b"no png")
    outside = ["../../secret.png", str(tmp_path / "secret.png"), 7, None]
    write_json(folder / "record.json", {**record, "pictures": names + outside, "calibration": 1})
    (folder / "curves.json").write_text('{"image": {"roc": [[0, "x"]], "pr": [1, 2]}, "pixel": 5}')
    (run_folder(tmp_path / "runs" / "b", "dfm") / "metrics.json").unlink()
    (run_folder(tmp_path / "runs" / "c", "spade") / "scores.csv").write_text("path,label\n1,2\n")
    (run_folder(tmp_path / "runs" / "d") / "metrics.json").write_text('{"image_auroc": "high", "defects": 3}')
    for name, wrong in {"e": {"crop": [1, 2]}, "f": {"environment": 3}, "g": {"peak_memory_mb": "much"}}.items():
        run_folder(tmp_path / "runs" / name, **wrong)
    assert write(tmp_path / "runs", tmp_path / "report.html", **BUDGET) == 7
    data = inside(tmp_path / "report.html")
    assert data["left_out"]["unread"] == 1
    assert {run["name"]: run["record"]["status"] for run in data["runs"]} == {
        **dict.fromkeys("ac", "finished"),
        **dict.fromkeys("bdefg", "unreadable"),
    }
    (run,) = (run for run in data["runs"] if run["name"] == "a")
    assert run["record"]["pictures"] == len(names)
    assert run["curves"] == {}


def test_no_run_and_no_room_are_errors(tmp_path):
    for wrong, named in ({}, "runs="), ({"max_mb": 0}, "max_mb=0"):
        with pytest.raises(InputError, match=named):
            write(tmp_path, tmp_path / "report.html", **{**BUDGET, **wrong})


def test_a_real_run(tmp_path):
    quick = ["model=padim", "data=textures", "backbone=test_resnet", "weights=random", "image_size=64", "trainer=cpu", "logger=none"]
    cfg = composed(*quick, "trainer.enable_progress_bar=false", "save.pictures=8", f"run_dir='{tmp_path / 'runs' / 'padim'}'")
    metrics = train(cfg)
    settings = composed(f"runs='{tmp_path / 'runs'}'", config="report")
    assert write(settings.runs, settings.output, settings.max_mb, settings.images, settings.picture_px) == 1
    data = inside(tmp_path / "runs" / "report.html")
    (setting,) = data["settings"]
    assert setting["values"]["pixel_auroc"] == [metrics["pixel_auroc"], None]
    assert data["decisions"] == ["image_recall", "image_false_alarm_rate"]
    assert setting["values"]["image_recall"] == [metrics["image_recall"], None]
    assert set(data["runs"][0]["curves"]) == set(CURVES)
    (gallery,) = data["galleries"]
    assert gallery["drawn"] == 8
    assert len(gallery["lists"]["worst"]) == 4
    assert all(set(of) == {"map", "overlay"} for image in gallery["images"] for id, of in image["panels"].items() if id != "image")


# ---- in a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window and without a network."""
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = (next(filter(None, map(shutil.which, names)), None) for names in (("chromium", "google-chrome"), ("chromedriver",)))
    if not chromium or not driver:
        pytest.skip("no Chromium and chromedriver here")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    # nothing may be looked up; root has no sandbox, containers have little shared memory
    flags = ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars", "host-resolver-rules=MAP * ~NOTFOUND")
    for flag in flags:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield chrome
    chrome.quit()


def resized(browser, width, height, scheme="light"):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})


@pytest.fixture
def opened(browser, page):
    """The page, fresh; afterwards nothing was complained of, loaded from elsewhere or run that should not."""
    browser.get_log("browser"), browser.get_log("performance")
    resized(browser, 1600, 1000)
    browser.get(page.as_uri())
    yield browser
    assert browser.execute_script("return window.hit") is None
    assert browser.execute_script("return document.querySelectorAll('[onerror]').length") == 0
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}


def rows(browser, group):
    """Texts of the visible rows of the first group whose title holds `group`: [[cell, …], …]."""
    return browser.execute_script(
        """const body = [...document.querySelectorAll("#board tbody")].find(of => of.rows[0].textContent.includes(arguments[0]));
        return [...body.rows].slice(1).filter(of => !of.hidden).map(row => [...row.cells].map(cell => cell.textContent));""",
        group,
    )


def wait(browser, until):
    """Return when `until()` holds; TimeoutException after 20 s."""
    from selenium.webdriver.support.ui import WebDriverWait  # where it is absent, there is no browser to wait for

    WebDriverWait(browser, 20).until(lambda _: until())


def find(browser, selector):
    return browser.find_element("css selector", selector)


def find_all(browser, selector):
    return browser.find_elements("css selector", selector)


@pytest.mark.slow
def test_sorts_by_click_and_by_key(opened):
    def figures(column):
        return [float(re.search(r"[\d.]+", row[column])[0]) for row in rows(opened, "screw · protocol paper")]

    headings = find_all(opened, "#board thead th")
    assert headings[1].get_attribute("aria-sort") == "descending"
    assert figures(1) == sorted(figures(1), reverse=True)
    assert [row[0][0] for row in rows(opened, "screw · protocol paper")] == ["1", "2", "3"]
    find(headings[1], "button").click()
    assert headings[1].get_attribute("aria-sort") == "ascending"
    assert figures(1) == sorted(figures(1))
    find(headings[7], "button").send_keys("\ue007")  # enter: by the seconds of the fit, the fastest first
    assert headings[7].get_attribute("aria-sort") == "ascending"
    assert headings[1].get_attribute("aria-sort") == "none"
    assert figures(7) == sorted(figures(7))
    find(headings[0], "button").send_keys(" ")
    assert [re.sub(r"^\d+", "", row[0]) for row in rows(opened, "bottle")] == ["padim", "patchcore", "reverse_distillation"]


@pytest.mark.slow
def test_the_best_of_a_column_is_marked_in_its_group_alone(opened):
    for group in ("screw · protocol paper", "bottle", "mean of 3 categories"):
        found = rows(opened, group)
        column = [row[1] for row in found]
        starred = [text for text in column if text.startswith("★")]
        assert starred
        assert float(starred[0][1:6]) == max(float(text.lstrip("★")[:5]) for text in column)
    assert not any("★" in cell for row in rows(opened, "protocol clean") for cell in row)  # nothing to compare it with


def visible(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('#board tbody:not([hidden]) tr[data-setting]')].filter(of => !of.hidden).length"
    )


@pytest.mark.slow
def test_filters_by_text_and_by_choice(opened):
    assert opened.find_element("id", "count").text == "9 of 9 settings"
    opened.find_element("id", "text").send_keys("PATCH core")
    assert opened.find_element("id", "count").text == "3 of 9 settings"
    assert visible(opened) == 4  # with the mean
    assert len(find_all(opened, "#heat tbody tr")) == 1
    opened.find_element("id", "clear").click()
    find(opened, "#selects select[aria-label=protocol] option[value=clean]").click()
    assert opened.find_element("id", "count").text == "1 of 9 settings"
    assert [row[0] for row in rows(opened, "protocol clean")] == ["1padim"]
    opened.find_element("id", "clear").click()
    find(opened, "#selects select[aria-label=category] option[value=bottle]").click()
    assert visible(opened) == 3
    opened.find_element("id", "text").send_keys("nothing is called so")
    assert visible(opened) == 0
    opened.find_element("id", "clear").click()
    assert opened.find_element("id", "count").text == "9 of 9 settings"


@pytest.mark.slow
def test_the_matrix_has_a_number_in_every_cell_and_a_mean_over_what_all_have(opened):
    table = opened.execute_script(
        "return [...document.querySelectorAll('#heat tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    )
    assert len(table) == 4
    assert HOSTILE in table[0][1] or HOSTILE in table[0][3]
    place = next(index for index, text in enumerate(table[0]) if HOSTILE in text)
    for row in table[1:]:
        cells = [cell for index, cell in enumerate(row[1:-1], 1) if index != place]
        assert float(row[-1]) == pytest.approx(np.mean(list(map(float, cells))), abs=1.1e-3)
        assert (row[place] == "–") == (row[0] == "padim")
    assert "2 of 3 columns" in opened.find_element("id", "matrix-note").text


@pytest.mark.slow
def test_opens_an_image_with_every_method_and_closes_it(opened):
    dialog = opened.find_element("id", "viewer")
    find(opened, "#cards button").click()
    assert dialog.is_displayed()
    names = [of.text for of in find_all(opened, "#panels figcaption b")]
    assert names[:2] == ["input", "ground truth"]
    assert {"patchcore", "reverse_distillation"} <= set(names)
    pictures = "return [...document.querySelectorAll('#panels img')].map(of => of.naturalWidth)"
    wait(opened, lambda: all(width > 50 for width in opened.execute_script(pictures)))  # they are being decoded
    sources = "return [...document.querySelectorAll('#panels img')].map(of => of.src)"
    before, title = opened.execute_script(sources), opened.find_element("id", "viewer-title").text
    find(opened, "input[name=panel][value=map]").click()
    after = opened.execute_script(sources)
    assert before[:2] == after[:2]
    assert not set(before[2:]) & set(after[2:])
    opened.find_element("id", "next").click()
    assert opened.find_element("id", "viewer-title").text != title
    opened.find_element("id", "next").send_keys("\ue012")  # arrow to the left
    assert opened.find_element("id", "viewer-title").text == title
    opened.find_element("id", "close").send_keys("\ue00c")  # escape
    assert not dialog.is_displayed()
    find(opened, "#cards button").click()
    opened.find_element("id", "close").click()
    assert not dialog.is_displayed()


@pytest.mark.slow
def test_curves_are_chosen_and_drawn(opened):
    def lines():
        return len(find_all(opened, "#curves-chart .curve"))

    find(opened, "#curves-controls select[aria-label=curve] option[value=pixel_pro]").click()
    dashes = [of.get_attribute("stroke-dasharray") for of in find_all(opened, "#curves-chart .curve")]
    assert len(set(dashes)) == len(dashes) == 3  # of the seed that left curves.json
    find(opened, "#curves-key input").click()
    assert lines() == 2
    find(opened, "#curves-controls select[aria-label=curve] option[value=image_roc]").click()
    assert lines() == 4
    marks = find_all(opened, "#cost-chart .mark")
    assert len({of.get_attribute("d") for of in marks}) == len(marks) == 3 or len(marks) == 2


def body(browser, details):
    """Wait for what a record shows when it is opened: the browser tells of the opening only after the click has returned."""
    wait(browser, lambda: find_all(details, ".body"))


@pytest.mark.slow
def test_records_say_how_every_run_ended(opened):
    texts = [of.text for of in find_all(opened, "#records > div > details > summary")]
    assert sorted(text.split()[0] for text in texts) == ["FAILED:", "RUNNING", "UNREADABLE:"]
    failed = next(of for of in find_all(opened, "#records > div > details") if "FAILED" in of.text)
    failed.find_element("tag name", "summary").click()
    body(opened, failed)
    assert HOSTILE in failed.text
    assert "_target_: blemish.methods.vae.Method" in failed.text
    shelf = find(opened, "#records > details")
    shelf.find_element("tag name", "summary").click()
    run = find(shelf, "details")
    run.find_element("tag name", "summary").click()
    body(opened, run)
    opened.execute_script("arguments[0].scrollIntoView()", run)
    assert {"weights", "tools/train.py", "fit seconds"} <= set(run.text.split("\n"))
    assert "hole 12 " in run.text


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height", "scheme"), [(360, 740, "light"), (360, 740, "dark"), (1600, 1000, "light")])
def test_fits_a_phone_and_a_wide_screen(opened, tmp_path, width, height, scheme):
    resized(opened, width, height, scheme)
    opened.refresh()
    opened.execute_script("document.querySelectorAll('details').forEach(of => { of.open = true; })")
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    opened.get_screenshot_as_file(str(tmp_path / "page.png"))
    find(opened, "#cards button").click()
    assert opened.execute_script("const of = document.querySelector('#viewer'); return of.scrollWidth - of.clientWidth") <= 0
    opened.get_screenshot_as_file(str(tmp_path / "image.png"))
    for name in ("page", "image"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == (width, height)
            assert np.asarray(picture.convert("L")).std() > 10
