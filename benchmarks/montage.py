"""Draw the picture of the README: python benchmarks/montage.py FOLDER writes docs/images/cookies.png.

FOLDER has the cookies of github.com/aws-samples/amazon-lookout-for-vision (CC BY-SA 4.0) in the layout of MVTec AD. PatchCore learns from
train/good by its recipe. The columns are chosen by their place in the list sorted by name, never by result: four of test/cracked and two
of test/good.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from blemish import AnomalyDetector
from blemish.draw import ALARM, DASH, TRUTH, colour, font, outline

PAGE = Path(__file__).parents[1] / "docs" / "images" / "cookies.png"
CHOSEN = {"cracked": 4, "good": 2}
SIZE, GAP, LINE = (162, 216), 6, 22  # px of a picture, between pictures, of a line of words


def main(root: Path) -> None:
    detector = AnomalyDetector("patchcore", progress=False).train(root / "train" / "good")
    columns = []
    for defect, count in CHOSEN.items():
        paths = sorted((root / "test" / defect).iterdir())
        chosen = paths[len(paths) // (2 * count) :: len(paths) // count][:count]
        columns += [(defect, root / "ground_truth" / defect / f"{path.stem}_mask.png", detector.predict(path)) for path in chosen]
    maps = np.stack([result.map for *_, result in columns])
    scale = float(np.median(maps)), float(np.quantile(maps, 0.999))  # one for all columns
    sheet = Image.new("RGB", (len(columns) * (SIZE[0] + GAP) - GAP, LINE + 2 * SIZE[1] + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (defect, mask, result) in enumerate(columns):
        x = column * (SIZE[0] + GAP)
        words = f"{defect} → {'anomalous' if result.decision else 'normal'}"
        pen.text((x + 2, 2), words, "black", font(14))
        picture = Image.open(result.path).convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
        if mask.is_file():
            outline(picture, np.asarray(Image.open(mask).convert("L")) / 255, 0.5, TRUTH, DASH)
        outline(picture, result.map, detector.map_threshold, ALARM, None)
        sheet.paste(picture, (x, LINE))
        sheet.paste(Image.fromarray(colour(result.map, scale)).resize(SIZE, Image.Resampling.LANCZOS), (x, LINE + SIZE[1] + GAP))
        print(f"{result.path.name}: {words}, score {result.score:.1f}, p-value {result.p_value:.3f}")
    PAGE.parent.mkdir(exist_ok=True)
    sheet.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(PAGE, optimize=True)
    print(detector.threshold.explain())
    print(f"contours at {detector.map_threshold:.1f}, colours from {scale[0]:.1f} to {scale[1]:.1f}")
    print(f"{PAGE}: {PAGE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
