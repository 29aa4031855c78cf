# A search of knobs by the held-out loss (docs/search.md). Its trials are runs that the job trains
# itself, one after the other: which comes next follows from those before.


rule search:
    input:
        lambda wildcards: searched(),


rule study:
    input:
        init=lambda wildcards: PLAN.backbone(SEARCH.studies[wildcards.study].ablation),
        data=lambda wildcards: prepared(searched_config(wildcards).training_data()),
    output:
        result="<results>/search/{study}.json",
        page="<results>/search/{study}.md",
    log:
        "<results>/logs/search/{study}.log",
    wildcard_constraints:
        study="|".join(SEARCH.studies) or "-",
    conda:
        "../../envs/sts.yaml"
    threads: lambda wildcards: max(map(cluster.cores, searched_config(wildcards).stages.values()))
    resources:
        **requested("study/{wildcards.study}"),
        gpu=lambda wildcards: gpus(
            max(stage.processes for stage in searched_config(wildcards).stages.values())
        ),
    params:
        config=config_file(PLAN.baseline),
        values=lambda wildcards: config_hash(
            SEARCH.model_dump(exclude={"studies"}),
            SEARCH.studies[wildcards.study].model_dump(),
            SCALE.stages,
            searched_config(wildcards).stages,
        ),
        code=lambda wildcards: training_code(
            SEARCH.studies[wildcards.study].ablation,
            *searched_config(wildcards).stages,
            also=["search.py"],
        ),
    message:
        "search {wildcards.study}"
    shell:
        "python -m sts search --config {params.config} --study {wildcards.study}"
        f" --settings {SEARCH_FILE} --ablations {ABLATIONS}"
        " --data {input.data} --init {input.init} --out {output.result} > {log} 2>&1"
