# Tables, figures and what the HTML report shows of them (its first page: ../report/overview.rst).


rule table:
    input:
        lambda wildcards: runs_of(wildcards.group, "eval"),
        lambda wildcards: runs_of(wildcards.group),
        "<results>/bench/{group}.json",
    output:
        "<results>/tables/{group}.md",
        "<results>/tables/{group}.csv",
        "<results>/tables/{group}.tex",
        "<results>/tables/{group}.json",
        report(
            "<results>/tables/{group}.html",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{group}"},
        ),
    log:
        "<results>/logs/tables/{group}.log",
    localrule: True
    conda:
        "../../envs/sts.yaml"
    params:
        results=subpath(output[0], ancestor=2),
        stem=subpath(output[0], strip_suffix=".md"),
        ablations=lambda wildcards: PLAN.members(wildcards.group),
        labels=lambda wildcards: [PLAN.ablations[id].label for id in PLAN.members(wildcards.group)],
        sources=lambda wildcards: [
            PLAN.ablations[id].source for id in PLAN.members(wildcards.group)
        ],
        bases=lambda wildcards: PLAN.compared_with(wildcards.group),
        beside=lambda wildcards: [":".join(pair) for pair in PLAN.of_equal_time(wildcards.group)],
        code=code("pipeline/report/tables.py"),
    message:
        "table {wildcards.group}"
    shell:
        "python -m sts table --name {wildcards.group} --results {params.results}"
        " --ablations {params.ablations} --labels {params.labels:q}"
        " --sources {params.sources} --relative-to {params.bases}"
        " --beside {params.beside}"
        " --out-stem {params.stem} > {log} 2>&1"


# Published scores beside those obtained, for a scale that some are known of.
if REFERENCE.exists():

    rule expected:
        input:
            reference=REFERENCE,
            runs=[
                PLAN.manifest(id, seed, "eval")
                for id, seed in PLAN.runs([load_yaml(REFERENCE)["ablation"]])
            ],
        output:
            f"{RESULTS}/tables/expected.md",
            f"{RESULTS}/tables/expected.csv",
        log:
            f"{RESULTS}/logs/tables/expected.log",
        localrule: True
        conda:
            "../../envs/sts.yaml"
        params:
            results=RESULTS,
            stem=f"{RESULTS}/tables/expected",
            code=code("pipeline/report/expected.py"),
        message:
            "published scores, and those obtained"
        shell:
            "python -m sts expected --reference {input.reference} --results {params.results}"
            " --out-stem {params.stem} > {log} 2>&1"


rule tokens:
    input:
        backbone=PLAN.backbone(PLAN.baseline),
        data=prepared(SCALE.training_data()[:1]),
    output:
        "<results>/tokens.json",
    log:
        "<results>/logs/tokens.log",
    conda:
        "../../envs/sts.yaml"
    params:
        code=code(
            "pipeline/measure/kept_tokens.py",
            *(f"vtc/{file.name}" for file in sorted((CODE / "vtc").glob("*.py"))),
        ),
    message:
        "the tokens that each compressor keeps"
    shell:
        "python -m sts tokens --backbone {input.backbone} --data {input.data}"
        " --out {output} > {log} 2>&1"


rule figure:
    input:
        lambda wildcards: PLAN.figure_files(wildcards.figure),
    output:
        report(
            "<results>/figures/{figure}.svg",
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        "<results>/figures/{figure}.png",
    log:
        "<results>/logs/figures/{figure}.log",
    localrule: True
    conda:
        "../../envs/sts.yaml"
    params:
        results=subpath(output[0], ancestor=2),
        stem=subpath(output[0], strip_suffix=".svg"),
        ablations=PLAN.members(MAIN),
        labels=[PLAN.ablations[id].label for id in PLAN.members(MAIN)],
        code=lambda wildcards: code(
            *(f"pipeline/report/figures/{name}.py" for name in ("__init__", wildcards.figure))
        ),
    message:
        "figure {wildcards.figure}"
    shell:
        "python -m sts figure --name {wildcards.figure} --results {params.results}"
        " --ablations {params.ablations} --labels {params.labels:q}"
        " --out-stem {params.stem} > {log} 2>&1"


rule examples:
    input:
        backbone=PLAN.backbone(PLAN.baseline),
        data=benchmark_data(PLAN.baseline),
        runs=PLAN.example_runs(),
    output:
        "<results>/examples.json",
    log:
        "<results>/logs/examples.log",
    conda:
        "../../envs/sts.yaml"
    params:
        config=config_file(PLAN.baseline),
        code=code(
            "pipeline/measure/examples.py",
            *(f"vtc/{file.name}" for file in sorted((CODE / "vtc").glob("*.py"))),
        ),
    message:
        "questions with the answers of two runs"
    shell:
        "python -m sts examples --config {params.config} --backbone {input.backbone}"
        " --data {input.data} --runs {input.runs} --out {output} > {log} 2>&1"


rule page:
    input:
        lambda wildcards: [file for file, is_made in page_tables().items() if is_made],
        PLAN.run_files(MAIN),
        PLAN.run_files(MAIN, "eval"),
        PLAN.timing(MAIN),
        "<results>/examples.json",
    output:
        "<results>/index.html",
    log:
        "<results>/logs/page.log",
    localrule: True
    conda:
        "../../envs/sts.yaml"
    params:
        results=subpath(output[0], parent=True),
        tables=lambda wildcards: [Path(file).stem for file in page_tables()],
        others=lambda wildcards: [
            sha256_file(file) for file, is_made in page_tables().items() if not is_made
        ],
        beside=lambda wildcards: [
            ":".join(pair)
            for file in page_tables()
            for pair in PLAN.of_equal_time(Path(file).stem)
        ],
        configfiles=[
            file
            for file in map(os.path.relpath, workflow.config_settings.configfiles)
            if file != MINI
        ],
        code=code("pipeline/report/page/__init__.py"),
    message:
        "the page of results"
    shell:
        "python -m sts page --results {params.results} --tables {params.tables}"
        " --beside {params.beside} --configfiles {params.configfiles} --out {output} > {log} 2>&1"
