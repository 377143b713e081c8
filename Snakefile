# The report pipeline. `make reports` runs it; see README.md for suites, seeds and clusters.
#   snakemake --cores 2 --config suite=mini seeds=1
# Calls come from wsol_nb.pipeline; every result, figure and table is named as an output, so that a missing one is made again.
import os

from wsol_nb import pipeline
from wsol_nb.core import base_dir, reports_root

SUITE = config.get("suite", "mini")
SEEDS = config.get("seeds", 1)
if not str(SEEDS).isdigit() or int(SEEDS) < 1:
    raise WorkflowError(f"seeds (make SEEDS=…) must be a whole number from 1, got {SEEDS!r}")
SEEDS = int(SEEDS)
WORKERS = config.get("workers", 0)      # helpers beside each sweep, each a job of its own
if not str(WORKERS).isdigit():
    raise WorkflowError(f"workers must be a whole number from 0, got {WORKERS!r}")
WORKERS = int(WORKERS)
HERE = base_dir()
OUT = reports_root() / SUITE
if SUITE not in pipeline.SUITES:
    raise WorkflowError(f"unknown suite {SUITE!r} (make SUITE=…): choose one of {', '.join(pipeline.SUITES)}")
CALLS = pipeline.calls(SUITE)
if not CALLS:
    wanted = ", ".join(call.dataset for call in pipeline.SUITES[SUITE])
    raise WorkflowError(f"nothing to run: none of {wanted} is in WSOL_DATA ({os.environ.get('WSOL_DATA', 'data')})")
EMBEDDED = [c.dataset for c in CALLS if c.dataset.startswith(("mini_", "toy"))]
TABLES = [row["id"] for row in pipeline.index() if row["kind"] == "table"] + [f"table_{c.stem}" for c in CALLS]
TABLES = list(dict.fromkeys(TABLES))
FIGURES = list(dict.fromkeys(f for call in CALLS for f in call.figures))
NOTEBOOKS = [*(call.name for call in CALLS), "summary"]
RESULTS = [path for call in CALLS for path in pipeline.outputs(call, OUT, SEEDS)]


def stamp(dataset):
    """A file with the checksum of an embedded data set; [] for real data, which the pipeline does not make."""
    return OUT / "data" / f"{dataset}.json" if dataset in EMBEDDED else []


rule all:      # names every file: what is not asked for is not missed
    message: "report complete"
    input:
        OUT / "index.html",
        RESULTS,
        [OUT / "tables" / f"{t}.{s}" for t in TABLES for s in ("csv", "md")],
        [OUT / "figures" / pipeline.picture(f) for f in FIGURES],
        [OUT / "notebooks" / f"{name}.html" for name in NOTEBOOKS],


for _data in dict.fromkeys(EMBEDDED):
    rule:
        name: f"data_{_data}"
        input: pipeline.data_sources(_data)
        output: stamp(_data)
        log: OUT / "logs" / f"data-{_data}.txt"
        message: f"data: {_data} (drawn, seeded)"
        params: data=_data
        priority: 100_000      # every call waits for its data
        threads: 1
        shell:
            "wsol data make {params.data:q} --stamp {output:q} > {log:q} 2>&1"


for _call in [c for c in CALLS if WORKERS and c.stem == "04_protocol"]:
    _code = pipeline.sources(HERE / "nbs" / f"{_call.notebook}.ipynb")
    for _worker in range(WORKERS):
        rule:
            name: f"worker_{_call.name}_{_worker}".replace("-", "_").replace(".", "_")
            input: code=_code, data=stamp(_call.dataset)
            output: touch(str(OUT / "workers" / f"{_call.name}-{_worker}.done"))
            log: OUT / "logs" / f"worker-{_call.name}-{_worker}.txt"
            message: f"worker {_worker} on the sweeps of {_call.dataset}"
            priority: _call.minutes + 1
            params: data=_call.dataset, variant=",".join(_call.variants), seeds=SEEDS
            threads: _call.threads
            resources: runtime=_call.minutes, mem_mb=8000 if not _call.gpus else 64000, **({"gpu": _call.gpus} if _call.gpus else {})
            shell:
                "OMP_NUM_THREADS={threads} wsol sweep {params.data:q} --variant {params.variant:q} --seeds {params.seeds} > {log:q} 2>&1"


for _call in CALLS:
    rule:
        name: _call.name.replace("-", "_").replace(".", "_")
        input: nb=str(HERE / "nbs" / f"{_call.notebook}.ipynb"), code=pipeline.sources(HERE / "nbs" / f"{_call.notebook}.ipynb"),
            data=stamp(_call.dataset), weights=pipeline.weights(HERE / "nbs" / f"{_call.notebook}.ipynb", _call.dataset),
            after=[path for other in CALLS if other.name in _call.after for path in pipeline.outputs(other, OUT, SEEDS)],
            workers=[OUT / "workers" / f"{_call.name}-{k}.done" for k in range(WORKERS if _call.stem == "04_protocol" else 0)]
        output: results=pipeline.outputs(_call, OUT, SEEDS), nb=OUT / "notebooks" / f"{_call.name}.ipynb"
        log: nb=OUT / "logs" / f"{_call.name}.ipynb", txt=OUT / "logs" / f"{_call.name}.txt"
        message: f"{_call.notebook} on {_call.dataset}, {SEEDS} seed(s); progress: {OUT}/logs/{_call.name}.txt"
        params: data=_call.dataset, variant=",".join(_call.variants), seeds=SEEDS
        threads: _call.threads
        priority: _call.minutes + sum(c.minutes for c in CALLS if _call.name in c.after)      # the longest first, and what others wait for
        resources: runtime=_call.minutes, mem_mb=8000 if not _call.gpus else 64000, **({"gpu": _call.gpus} if _call.gpus else {})
        shell:
            "OMP_NUM_THREADS={threads} papermill {input.nb:q} {log.nb:q} -p dataset {params.data:q} -p variant {params.variant:q}"
            " -p n_seeds {params.seeds} --log-output --no-progress-bar --autosave-cell-every 5 > {log.txt:q} 2>&1"
            " && cp {log.nb:q} {output.nb:q}"


rule summary:
    input: RESULTS, nb=str(HERE / "nbs" / "07_summary.ipynb"), code=pipeline.sources(HERE / "nbs" / "07_summary.ipynb"),
        published=sorted(map(str, pipeline.published_dir().glob("*.csv")))
    output: OUT / "notebooks" / "summary.ipynb"
    log: nb=OUT / "logs" / "summary.ipynb", txt=OUT / "logs" / "summary.txt"
    message: "07_summary"
    params: suite=SUITE
    shell:
        "papermill {input.nb:q} {log.nb:q} -p suite {params.suite:q} --log-output --no-progress-bar > {log.txt:q} 2>&1"
        " && cp {log.nb:q} {output:q}"


# Pages come last in the queue: those of the calls that start first are written while the last calls still run. One process for
# several, because starting it costs more than a page.
_first = sorted(CALLS, key=lambda c: -c.minutes)[:2 * len(CALLS) // 3]
for _part, _names in {
    "early": [c.name for c in _first], "late": [c.name for c in CALLS if c not in _first], "summary": ["summary"],
}.items():
    if not _names:
        continue
    rule:
        name: f"pages_{_part}"
        input: [OUT / "notebooks" / f"{name}.ipynb" for name in _names]
        output: [OUT / "notebooks" / f"{name}.html" for name in _names]
        message: f"pages of the notebooks ({_part})"
        params: folder=OUT / "notebooks"
        shell: "jupyter nbconvert --to html --log-level WARN --output-dir {params.folder:q} {input:q}"


rule report:
    input:
        RESULTS,
        [OUT / "notebooks" / f"{name}.html" for name in NOTEBOOKS],
        pipeline.module_files("reports"),
        sorted(map(str, pipeline.published_dir().glob("*.csv"))),
    output:
        OUT / "index.html",
        [OUT / "tables" / f"{t}.{s}" for t in TABLES for s in ("csv", "md")],
        [OUT / "figures" / pipeline.picture(f) for f in FIGURES],
    message: "report: tables, figures, page"
    params: suite=SUITE, seeds=SEEDS
    shell: "python -c \"from wsol_nb.reports import build_report; build_report('{params.suite}', {params.seeds})\""
