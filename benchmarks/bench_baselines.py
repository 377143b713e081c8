"""The baselines beside CAM and the centred box on one data set: runs what has no result yet, then writes a table.

    python benchmarks/bench_baselines.py --dataset mini_cub --seeds 3                 # about 90 core-minutes on a CPU
    python benchmarks/bench_baselines.py --dataset mini_cub --seeds 3 --no-run        # only the table, from what there is
    python benchmarks/bench_baselines.py --dataset toy --only has scm --out baselines

Results go where all results go (WSOL_REPORTS), the table to OUT.csv and OUT.md. Scores are those of the notebooks, in percent, on the test
split; MaxBoxAcc and MaxBoxAccV2 at the best threshold of the test split, as the field defines them.
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from wsol_nb.core import atomic_path, base_dir
from wsol_nb.pipeline import suite_of
from wsol_nb.reports import measured

NOTEBOOKS = ["01_cams", *(f"baselines/{name}" for name in ("has", "acol", "spg", "adl", "cutmix", "ts_cam", "nl_ccam", "scm", "sat", "f_cam"))]
SCORES = ("MaxBoxAcc", "MaxBoxAccV2", "PxAP", "cls")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="mini_cub")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of notebooks, such as has; CAM is always there")
    parser.add_argument("--no-run", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/baselines"), help="name of the table without suffix")
    return parser.parse_args()


def run(notebook: str, dataset: str, seeds: int) -> None:
    """Execute a notebook; runs that are finished are read, not made again."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["papermill", base_dir() / "nbs" / f"{notebook}.ipynb", Path(folder) / "out.ipynb", "-p", "dataset", dataset,
                        "-p", "n_seeds", str(seeds)], check=True)


def table(notebooks: list[str], dataset: str, seeds: int) -> pd.DataFrame:
    """A row per method: mean and standard deviation over seeds, and how far it lies from CAM, seed by seed."""
    stems = [name.split("/")[-1] for name in notebooks]
    found = pd.concat([measured(suite_of(dataset), stem).query("table == @stem") for stem in stems])
    found = found[(found["dataset"] == dataset) & (found["condition"] == "") & found["metric"].isin(SCORES) & (found["variant"] == "full")
                  & (found["seed"] < seeds)]
    cam, rows = found[found["method"] == "CAM"].set_index(["metric", "seed"])["value"], []
    for method, of in found.groupby("method", sort=False):
        row = {"method": method, "network": of["backbone"].iloc[0], "seeds": of["seed"].nunique(), "device": ", ".join(sorted(set(of["device"])))}
        for metric, values in of.drop_duplicates(["metric", "seed"]).groupby("metric"):
            values = values.set_index("seed")["value"]
            row |= {metric: values.mean(), f"{metric}, sd": values.std()}
            if method != "CAM" and len(values) > 1 and metric != "cls":
                gain = (values - cam[metric]).dropna()
                row |= {f"{metric}, above CAM": gain.mean(), f"{metric}, above CAM, sd": gain.std()}
        rows.append(row)
    return pd.DataFrame(rows)


def text_of(row: pd.Series, metric: str) -> str:
    """'61.2 ± 2.0', '61.2' for one seed, '' where nothing was measured; differences with their sign."""
    value, sd = row.get(metric), row.get(f"{metric}, sd")
    number = "" if pd.isna(value) else f"{value:+.1f}" if "above" in metric else f"{value:.1f}"
    return number + ("" if pd.isna(sd) else f" ± {sd:.1f}")


def page(rows: pd.DataFrame, dataset: str, command: str) -> str:
    """The table as Markdown."""
    metrics = [m for m in SCORES if m in rows]
    gains = [f"{m}, above CAM" for m in metrics if f"{m}, above CAM" in rows]
    head = ["method", "network", *metrics, *gains, "seeds"]
    lines = [[row["method"], row["network"], *(text_of(row, m) for m in (*metrics, *gains)), str(row["seeds"])] for _, row in rows.iterrows()]
    devices = "; ".join(sorted(set(rows["device"])))
    return "\n".join([f"# Baselines on {dataset}", "", f"Made by `{command}` on {devices}. Percent on the test split, mean ± standard deviation over "
                      "seeds; box scores at the best threshold of the test split, the epoch chosen on val. 'above CAM': difference, seed by seed, from CAM; TS-CAM, SCM and SAT start from another network than CAM does.",
                      "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(line) + " |" for line in lines), ""])


def main() -> None:
    args = options()
    unknown = set(args.only or ()) - {name.split("/")[-1] for name in NOTEBOOKS}
    if unknown or args.seeds < 1:
        sys.exit(f"--only takes names of {', '.join(n.split('/')[-1] for n in NOTEBOOKS)}, --seeds at least 1; got {args.only}, {args.seeds}")
    notebooks = [n for n in NOTEBOOKS if not args.only or n == "01_cams" or n.split("/")[-1] in args.only]
    for notebook in [] if args.no_run else notebooks:
        print(notebook, flush=True)
        run(notebook, args.dataset, args.seeds)
    rows = table(notebooks, args.dataset, args.seeds)
    if rows.empty:
        sys.exit(f"no results of {args.dataset} yet: leave out --no-run")
    command = f"python benchmarks/bench_baselines.py --dataset {args.dataset} --seeds {args.seeds}"
    for suffix, content in (("csv", rows.round(3).to_csv(index=False)), ("md", page(rows, args.dataset, command))):
        with atomic_path(args.out.with_suffix(f".{suffix}")) as path:
            path.write_text(content, encoding="utf-8")
    print(page(rows, args.dataset, command))


if __name__ == "__main__":
    main()
