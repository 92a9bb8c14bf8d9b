"""Tables of experiments.jsonl and range_test.jsonl, so that no figure is copied by hand.

    python -m docs.tables        writes each table between its two markers in README.md and
                                 docs/measurements.md

± is the standard deviation over runs; that of a difference is its standard error.
"""
import functools
import itertools
import re
import statistics
from collections import defaultdict
from pathlib import Path

from docs import range_test
from docs.experiments import MAP_RATES, PARTS, read

HERE = Path(__file__).parent
PAGES = HERE.parent / "README.md", HERE / "measurements.md"
NAMES = {"one cycle": "one cycle", "annihilated": "one cycle to zero", "constant": "constant",
         "steps": "step decay", "no rise": "straight fall to LRMIN",
         "linear": "straight fall to zero",
         "warm-up": "a short rise"}


ARMS = {
    "{}": "the recipe", "{'smoothing': 0.1}": "label smoothing 0.1",
    "{'smoothing': 0.2}": "label smoothing 0.2", "{'decay': 0.995}": "average with d up to 0.995",
    "{'flip': 'coin'}": "an image mirrored by chance in each epoch",
    "{'sharpness': 2.0}": "logits x 1/4", "{'weight_decay': 0.0}": "no weight decay",
    "{'momentum': 0.9}": "momentum 0.9", "{'sharpness': 8.0}": "logits as they are",
    "{'fc': 8, 'norms': 8}": "last layer and norms x 8",
    "{'fc': 8}": "last layer's rate x 8", "{'fc': 32}": "last layer's rate x 32",
    "{'norms': 8}": "norms' rate x 8",
    "{'fc momentum': 0.9}": "last layer's momentum 0.9",
    "{'fc': 8, 'norms': 8, 'weight_decay': 0.000125}": "last layer and norms x 8, decay / 8",
    "{'fc': 8, 'norms': 8, 'smoothing': 0.2}": "last layer and norms x 8, label smoothing 0.2",
    "{'start_from': 'identity'}": "widening convolutions start as the identity",
    "{'fc': 8, 'start_from': 'identity'}": "last layer's rate x 8, start as the identity",
    "{'start_from': 'patches'}": "first layer starts as the patches' eigenvectors",
    "{'start_from': 'patches', 'zero fc': True, 'sharpness': 2.83}":
        "first layer starts as the patches' eigenvectors, last as zeros with logits x 0.35",
    "{'start_from': 'patches', 'fc': 2, 'norms': 2, 'smoothing': 0.2}":
        "patches' eigenvectors, last layer and norms x 2, label smoothing 0.2",
    "{'start_from': 'patches, frozen'}": "first layer is the patches' eigenvectors, frozen",
    "{'ghost': True}": "batch normalisation of 128 images at a time",
    "{'momentum': '0.6 .. 0.85'}": "momentum up to 0.85 in the last quarter",
    "{'decay': 0.995, 'lr': 0.125}": "average with d up to 0.995, LRMAX 0.125",
    "{'decay': 0.998, 'lr': 0.125}": "average with d up to 0.998, LRMAX 0.125",
    "{'uphill': 0.2}": "gradients from 0.2 uphill (SAM) in the last five epochs",
    "{'unit filters': True}": "the norm of each filter fixed, not of each layer",
    "{'teacher': 0.5}": "labels mixed with the last epoch's answers (PS-KD), up to 0.5",
    "{'fc': 2, 'norms': 2, 'smoothing': 0.2}": "last layer and norms x 2, label smoothing 0.2"}


def pick(rows, part, width=64, images=None, **arm):
    """The rows of a part whose arm has these values."""
    return [row for row in rows if row["part"] == part and row["width"] == width
            and row["images"] == images and arm.items() <= row["arm"].items()]


def mean(rows, *path, digits=2):
    """mean ± standard deviation in %, as text."""
    values = []
    for row in rows:
        for key in path:
            row = row[key]
        values.append(100 * row)
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def difference(a, b):
    """mean ± standard error of the difference of paired values in points, as text."""
    pairs = [100 * (x - y) for x, y in zip(a, b, strict=True)]
    error = f" ± {statistics.stdev(pairs) / len(pairs) ** 0.5:.2f}" if len(pairs) > 1 else ""
    return f"{statistics.mean(pairs):+.2f}{error}"


def each(rows, key):
    return ", ".join(f"{100 * row[key]:.2f}" for row in rows)


def lines(head, body):
    cells = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in cells)


def schedules(rows):
    """The README's table: what ends where, at full size on the test set."""
    body = []
    for part, optimizer, schedule, text, epochs in (
            ("sgd", "sgd", "one cycle", "0.02, up to 0.2, down to 0.02", 24),
            ("sgd", "sgd", "annihilated", "0.02, up to 0.2, down to 0", 24),
            ("sgd", "sgd", "constant", "0.1", 24),
            ("sgd", "sgd", "steps", "0.2; 0.02 after 1/2, 0.002 after 3/4", 24),
            ("sgd-48", "sgd", "steps", "the same", 48)):
        same = pick(rows, part, optimizer=optimizer, schedule=schedule)
        body.append([NAMES[schedule], text, epochs, mean(same, "raw"), mean(same, "averaged"),
                     len(same)])
    return lines(["schedule", "learning rate", "epochs", "raw weights", "averaged weights", "n"],
                 body)


def runs(rows, part, width, images):
    """Every run of a part, with the mean."""
    body = []
    for optimizer, schedule in (("sgd", "one cycle"), ("sgd", "annihilated"), ("sgd", "constant"),
                                ("sgd", "steps"), ("muon", "one cycle"), ("muon", "annihilated")):
        for name in (part, f"{part}-48", f"{part}-120", "muon"):
            same = pick(rows, name, width, images, optimizer=optimizer, schedule=schedule)
            if same:
                body.append([f"{'SGD' if optimizer == 'sgd' else 'Muon'}, {NAMES[schedule]}",
                             same[0]["arm"]["lr"], same[0]["arm"].get("epochs", 24),
                             *(f"{mean(same, key)} ({each(same, key)})"
                               for key in ("averaged", "raw", "flipped"))])
    return lines(["", "top rate", "epochs", "averaged", "raw", "averaged over flips"], body)


def apart(rows, width, images):
    """Raw and averaged weights, each with several kinds of batch statistics."""
    body = []
    kinds = "raw", "raw, measured", "averaged, averaged statistics", "averaged"
    for part, name, arm in (("sgd", "SGD, one cycle", {"schedule": "one cycle"}),
                            ("sgd", "SGD, one cycle to zero", {"schedule": "annihilated"}),
                            ("sgd", "SGD, constant", {"schedule": "constant"}),
                            ("sgd", "SGD, step decay", {"schedule": "steps"}),
                            ("muon", "Muon, one cycle", {"schedule": "one cycle"}),
                            ("muon", "Muon, one cycle to zero", {"schedule": "annihilated"}),
                            ("choices", "Muon, one cycle: `choices`", {})):
        same = [row for row in pick(rows, part, width, images, **arm)
                if "raw, measured" in row and (arm or not row["arm"])]
        if same:
            body.append([name, *(mean([row for row in same if kind in row], kind)
                                 for kind in kinds),
                         *(difference([row[kind] for row in same], [row["raw"] for row in same])
                           for kind in ("averaged", "raw, measured")), len(same)])
    return lines(["", "raw, running", "raw, measured", "averaged, averaged", "averaged, measured",
                  "lead of the average", "of which statistics", "n"], body)


def grid(rows, part, width, images, rates, arms):
    """Averaged / raw accuracy on held-out images, a column a rate."""
    body = []
    for name, arm in arms:
        cells = []
        for rate in rates:
            same = pick(rows, part, width, images, lr=rate, **arm)
            cells.append(f"{mean(same, 'held out', 'averaged')} / {mean(same, 'held out', 'raw')}"
                         if same else "")
        body.append([name, *cells])
    return lines(["rate", *map(str, rates)], body)


def gain(a, b, *path):
    """The difference between the rows a and b of the same seeds, as text; "" if there are none."""
    a, b = ({row["seed"]: functools.reduce(dict.get, path, row) for row in rows} for rows in (a, b))
    seeds = sorted(a.keys() & b.keys())
    return difference([a[seed] for seed in seeds], [b[seed] for seed in seeds]) if seeds else ""


def beside_the_recipe(rows, part, width, images):
    """Each arm of a part on held-out images, and its paired gain over the recipe.

    Where all images that are not trained on were counted, too: the gain on them, and on the test
    set, which decides nothing.
    """
    arms, wide = defaultdict(list), defaultdict(list)
    for row in pick(rows, part, width, images):
        arms[str(row["arm"])].append(row)
        if "all held out" in row:
            wide[str(row["arm"])].append(row)
    body = [[ARMS.get(arm, arm), mean(same, "held out", "averaged"), mean(same, "held out", "raw"),
             len(same), *([""] * 4 if arm == "{}" else [
                 gain(same, arms["{}"], "held out", "averaged"),
                 gain(wide[arm], wide["{}"], "all held out", "averaged"), len(wide[arm]) or "",
                 gain(same, arms["{}"], "averaged") if wide["{}"] else ""])]
            for arm, same in arms.items()]
    body.sort(key=lambda row: (row[0] != "the recipe", -float(row[4].split(" ")[0] or 0)))
    head = ["", "averaged", "raw", "n", "gain, on the same seeds", "gain on all 25,000", "n",
            "gain on the test set"]
    columns = len(head) if any(wide.values()) else 5
    return lines(head[:columns], [row[:columns] for row in body])


def rise(rows):
    """With and without the rise, half size: means, and the paired difference to the cycle."""
    columns, body = (("averaged",), ("raw",), ("held out", "averaged"), ("held out", "raw")), []
    for lr in (0.1, 0.2, 0.4):
        for schedule, other in (("one cycle", "no rise"), ("annihilated", "linear")):
            pair = [pick(rows, "rise", 32, 25000, lr=lr, schedule=name)
                    for name in (schedule, other)]
            for name, same in zip((schedule, other), pair):
                if same:
                    body.append([lr, NAMES[name], *(mean(same, *path) for path in columns),
                                 len(same)])
            if all(pair):
                body.append([lr, "gain of the rise", *(gain(*pair, *path) for path in columns),
                             min(map(len, pair))])
    return lines(["LRMAX", "schedule", "averaged", "raw", "held out, averaged", "held out, raw",
                  "n"], body)


def short_runs(rows):
    """Averaged / raw accuracy with and without the rise, a column an LRMAX."""
    arms, body = (("map", "one cycle"), ("map no rise", "no rise"),
                  ("map warm-up", "warm-up"), ("map annihilated", "annihilated"),
                  ("map linear", "linear")), []
    cells = {part: [pick(rows, part, 32, 12500, lr=lr) for lr in MAP_RATES]
             for part, _ in arms}
    for part, schedule in arms:
        body.append([NAMES[schedule], *(f"{mean(same, 'averaged', digits=1)} / "
                                        f"{mean(same, 'raw', digits=1)}" if same else ""
                                        for same in cells[part])])
    for key, a, b, name in (("averaged", "map", "map no rise", "to LRMIN, averaged"),
                            ("averaged", "map", "map warm-up", "over a short one, averaged"),
                            ("raw", "map annihilated", "map linear", "to zero, raw")):
        body.append([f"gain of the rise, {name}", *map(
            gain, cells[a], cells[b], itertools.repeat(key))])
    body.append(["n", *(", ".join(str(len(cells[part][k])) for part, _ in arms)
                        for k in range(len(MAP_RATES)))])
    return lines(["schedule", *(f"LRMAX {lr}" for lr in MAP_RATES)], body)


def map_cell(rows, decay, lr):
    """The short runs of one cycle with this weight decay and LRMAX."""
    return [row for part in ("map", "map, other decays")
            for row in pick(rows, part, 32, 12500, lr=lr, weight_decay=decay)]


def decays(rows):
    """The map: averaged / raw accuracy over LRMAX and weight decay, seed 0."""
    body = []
    for decay in DECAYS:
        cells = [[row for row in map_cell(rows, decay, lr) if row["seed"] == 0]
                 for lr in MAP_RATES]
        body.append([f"{decay:g}", *(f"{mean(same, 'averaged', digits=1)} / "
                                     f"{mean(same, 'raw', digits=1)}" if same else ""
                                     for same in cells)])
    return lines(["weight decay", *(f"LRMAX {lr}" for lr in MAP_RATES)], body)


def best_rows(rows, schedule, epochs, images=12500):
    """The short runs of the schedule's arm that is the best on held-out images with seed 0."""
    arms, kind = defaultdict(list), {"optimizer": "sgd", "schedule": schedule, "epochs": epochs}
    for row in rows:
        arm = row["arm"]
        tuned = arm.keys() - kind.keys() <= {"lr", "weight_decay"}       # and nothing else differs
        if (row["width"], row["images"]) == (32, images) and kind.items() <= arm.items() and tuned:
            arms[arm["lr"], arm.get("weight_decay", 1e-3)].append(row)
    first = {arm: row["held out"]["averaged"] for arm, same in arms.items() for row in same
             if row["seed"] == 0}
    return arms[max(first, key=first.get)] if first else []


def at_their_best(rows, epochs, images, schedules):
    """Lines of a table: each schedule at its best rate, and how far the cycle is ahead."""
    body, cycle = [], best_rows(rows, "one cycle", epochs, images)
    for schedule in schedules:
        if same := best_rows(rows, schedule, epochs, images):
            arm = same[0]["arm"]
            body.append([NAMES[schedule], arm["lr"], arm.get("weight_decay", 0.001),
                         mean(same, "averaged"), mean(same, "raw"), len(same),
                         gain(cycle, same, "averaged") if same != cycle else ""])
    return body


def budget(rows):
    """Schedules with and without the rise in several numbers of epochs."""
    return lines(["epochs", *BEST], [
        [epochs, *line] for epochs in BUDGETS for line in at_their_best(
            rows, epochs, 12500, ("one cycle", "annihilated", "no rise", "linear"))])


def few_images(rows):
    """Schedules on several numbers of images, 12 epochs each."""
    return lines(["images", *BEST], [
        [f"{images:,}", *line] for images in SETS for line in at_their_best(
            rows, 12, images, ("one cycle", "linear", "steps"))])


def ladder(rows):
    """The README's ladder: what each addition to the assignment brings."""
    plain, muon = pick(rows, "sgd", schedule="one cycle"), pick(rows, "headline")
    average = difference([row["averaged"] for row in plain], [row["raw"] for row in plain])
    a, b = ([100 * row["averaged"] for row in same] for same in (muon, plain))
    lead = statistics.mean(a) - statistics.mean(b)
    error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    return lines(["", "accuracy in %", "n", "gain", "to repeat"], [
        ["the above with SGD, LRMAX 0.2; raw weights", mean(plain, "raw"), len(plain), "",
         "`python train.py --optimizer sgd --lr-max 0.2`, column `raw`"],
        ["+ averaged weights, fresh batch statistics", mean(plain, "averaged"), len(plain), average,
         "the same run, column `averaged`"],
        ["+ Muon instead of SGD", f"**{mean(muon, 'averaged')}**", len(muon),
         f"{lead:+.2f} ± {error:.2f}", "`python train.py`, column `averaged`"]])


def headline(rows):
    same = pick(rows, "headline")
    return lines(["", "mean ± std", "each seed"], [
        ["averaged weights: the result", mean(same, "averaged"), each(same, "averaged")],
        ["raw weights", mean(same, "raw"), each(same, "raw")]])


def ends(rows):
    """Short runs whose cycle starts, or ends, at another share of LRMAX, and their paired gains."""
    body, tenth = [], pick(rows, "map", 32, 12500, lr=0.8)
    for which in ("start", "end"):
        cells = [pick(rows, "map ends", 32, 12500, **{which: 1 / 3}), tenth,
                 pick(rows, "map ends", 32, 12500, **{which: 1 / 30}),
                 pick(rows, "map annihilated", 32, 12500, lr=0.8) if which == "end" else []]
        body.append([f"the {which} at", *(f"{mean(same, 'averaged')} / {mean(same, 'raw')}"
                                          if same else "" for same in cells)])
        body += [[f"gain over LRMAX / 10, {key}", *(gain(same, tenth, key) if same != tenth else ""
                                                    for same in cells)]
                 for key in ("averaged", "raw")]
    return lines(["", "LRMAX / 3", "LRMAX / 10", "LRMAX / 30", "0"], body)


def full_size(rows):
    """What passed at half size beside the recipe, each at full size up to the LRMAX it finds."""
    body, recipe = [], []
    for arm in PARTS["full size"]:
        same = [row for row in pick(rows, "full size") if row["arm"] == arm]
        name = ARMS[str({key: value for key, value in arm.items() if key != "share"})]
        name += ", up to 2/3 of LRMAX" if arm["share"] < 1 else ""
        if same:
            body.append([name, ", ".join(f"{row['lr']:.3f}" for row in same),
                         mean(same, "averaged"), mean(same, "raw"), mean(same, "flipped"),
                         len(same), gain(same, recipe, "averaged")])
        recipe = recipe or same
    return lines(["", "peak, each seed", "averaged", "raw", "averaged over flips", "n", "gain"],
                 body)


def taken(rows):
    """Runs up to a share of the LRMAX that their seed finds, and their paired gains over all of it.

    Accuracy of averaged weights on all images that are not trained on.
    """
    body, path = [], ("all held out", "averaged")
    for optimizer, name in (("muon", "Muon"), ("sgd", "SGD")):
        whole = pick(rows, "share", 32, 25000, optimizer=optimizer, share=1)
        for share, text in ((1, "LRMAX"), (2 / 3, "2/3"), (1 / 2, "1/2"), (1 / 3, "1/3")):
            same = pick(rows, "share", 32, 25000, optimizer=optimizer, share=share)
            if same:
                body.append([f"{name}, {text}", ", ".join(f"{row['lr']:.3f}" for row in same),
                             mean(same, *path), mean(same, "all held out", "raw"), len(same),
                             gain(same, whole, *path) if share < 1 else ""])
    return lines(["", "rate, each seed", "averaged", "raw", "n", "gain over LRMAX"], body)


def finders(rows):
    """The README's table: our rates, each package's, and a constant."""
    shown = "lr", "LRMAX", "torch-lr-finder, on our range", "fastai minimum / 10"
    (_, body), (_, small) = (range_test.summary(batch, shown) for batch in (32, 8))
    return lines(["finder", "batch 32: mean regret", "worst pair", "batch 8: mean regret"],
                 [[*a[:3], b[1]] for a, b in zip(body, small)])


DECAYS, BUDGETS, SETS = (2.5e-4, 1e-3, 4e-3), (6, 12, 24, 48), (5000, 12500, 25000)
BEST = ["schedule", "LRMAX", "decay", "averaged", "raw", "n", "the cycle's lead, averaged"]
RATES = 0.0125, 0.025, 0.05, 0.1, 0.2, 0.4
TABLES = {
    "ladder": ladder, "schedules": schedules, "headline": headline, "rise": rise,
    "recipe": lambda rows: beside_the_recipe(rows, "recipe", 64, 40000),
    "choices": lambda rows: beside_the_recipe(rows, "choices", 32, 25000),
    "short runs": short_runs, "map": decays, "budget": budget, "few images": few_images,
    "ends": ends, "taken": taken, "full size": full_size, "finders": finders,
    "finders, 32": lambda rows: lines(*range_test.summary(32)),
    "finders, 8": lambda rows: lines(*range_test.summary(8)),
    "shares": lambda rows: lines(*range_test.shares()),
    "pairs, 32": lambda rows: lines(*range_test.by_pair(32)),
    "pairs, 8": lambda rows: lines(*range_test.by_pair(8)),
    "full": lambda rows: runs(rows, "sgd", 64, None),
    "half": lambda rows: runs(rows, "sgd", 32, 25000),
    "apart": lambda rows: apart(rows, 64, None),
    "apart half": lambda rows: apart(rows, 32, 25000),
    "rates": lambda rows: grid(rows, "rates", 64, 40000, RATES, [
        (f"{name}, {NAMES[schedule]}", {"optimizer": optimizer, "schedule": schedule})
        for name, optimizer in (("SGD", "sgd"), ("Muon", "muon"))
        for schedule in ("constant", "steps")]),
    "range": lambda rows: grid(
        [row for row in rows if "start" not in row["arm"]], "range", 32, 25000, RATES[2:], [
            ("SGD", {"optimizer": "sgd"}), ("Muon", {"optimizer": "muon"})]),
}


def filled(page, rows):
    """The page's text with each table made anew between <!-- table NAME --> and <!-- end -->."""
    def table(match):
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]](rows)}\n<!-- end -->"
    return re.sub(r"<!-- table (.*?) -->\n.*?<!-- end -->", table, page.read_text(),
                  flags=re.DOTALL)


def main():
    rows = read()
    for page in PAGES:
        page.write_text(filled(page, rows))
    for name, make in TABLES.items():
        print(f"{name}\n{make(rows)}\n")


if __name__ == "__main__":
    main()
