# Tables, figures and what the HTML report shows of them.


rule table:
    input:
        lambda wildcards: evaluations(wildcards.group),
        lambda wildcards: trainings(wildcards.group),
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
    log:
        "<results>/logs/tables/{group}.log",
    conda:
        "../../envs/sts.yaml"
    params:
        results=subpath(output[0], ancestor=2),
        stem=subpath(output[0], strip_suffix=".md"),
        ablations=lambda wildcards: members(wildcards.group),
        labels=lambda wildcards: [ABLATIONS[id].label for id in members(wildcards.group)],
        code=code(CODE / "tables.py"),
    message:
        "table {wildcards.group}"
    shell:
        "python -m sts table --name {wildcards.group} --results {params.results}"
        " --ablations {params.ablations} --out-stem {params.stem} > {log} 2>&1"


rule figure:
    input:
        evaluations("main"),
        trainings("main"),
        "<results>/bench/main.json",
    output:
        report(
            "<results>/figures/{figure}.svg",
            caption="../report/{figure}.rst",
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
        code=code(CODE / "figures.py"),
    message:
        "figure {wildcards.figure}"
    shell:
        "python -m sts figure --name {wildcards.figure} --results {params.results}"
        " --ablations {params.ablations} --out-stem {params.stem} > {log} 2>&1"
