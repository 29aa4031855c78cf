# Tables, figures and what the HTML report shows of them.


rule table:
    input:
        lambda wildcards: run_files(wildcards.group, "eval"),
        lambda wildcards: run_files(wildcards.group, "instruct"),
        "<results>/bench/{group}.json",
    output:
        report(
            "<results>/tables/{group}.md",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{group}", "format": "Markdown"},
        ),
        "<results>/tables/{group}.csv",
        "<results>/tables/{group}.tex",
        "<results>/tables/{group}.json",
    log:
        "<results>/logs/tables/{group}.log",
    conda:
        "../../envs/sts.yaml"
    params:
        results=subpath(output[0], ancestor=2),
        stem=subpath(output[0], strip_suffix=".md"),
        ablations=lambda wildcards: members(wildcards.group),
        labels=lambda wildcards: [ABLATIONS[id].label for id in members(wildcards.group)],
        sources=lambda wildcards: [ABLATIONS[id].source for id in members(wildcards.group)],
        code=code(CODE / "tables.py"),
    message:
        "table {wildcards.group}"
    shell:
        "python -m sts table --name {wildcards.group} --results {params.results}"
        " --ablations {params.ablations} --labels {params.labels:q}"
        " --sources {params.sources} --out-stem {params.stem} > {log} 2>&1"


rule figure:
    input:
        run_files("main", "eval"),
        run_files("main", "instruct"),
        run_files("main", "align"),
        prepared(["scenes"]),
        "<results>/backbone/manifest.json",
        "<results>/bench/main.json",
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
    conda:
        "../../envs/sts.yaml"
    params:
        results=subpath(output[0], ancestor=2),
        stem=subpath(output[0], strip_suffix=".svg"),
        ablations=members("main"),
        labels=[ABLATIONS[id].label for id in members("main")],
        code=lambda wildcards: code(
            CODE / "figures.py", *(CODE / file for file in FIGURES[wildcards.figure])
        ),
    message:
        "figure {wildcards.figure}"
    shell:
        "python -m sts figure --name {wildcards.figure} --results {params.results}"
        " --ablations {params.ablations} --labels {params.labels:q}"
        " --out-stem {params.stem} > {log} 2>&1"
