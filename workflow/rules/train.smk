# The two stages of a run. A job's output is a small manifest; the weights lie beside it undeclared,
# so that no failure and no rerun deletes them. A job follows the settings and formulas in `params`.


rule align:
    input:
        init="<results>/backbone/manifest.json",
        data=lambda wildcards: prepared(CONFIGS[wildcards.ablation].align.data),
    output:
        "<results>/runs/{ablation}/seed{seed}/align.json",
    log:
        "<results>/logs/runs/{ablation}/seed{seed}/align.log",
    wildcard_constraints:
        ablation="|".join(owners("align")),
    conda:
        "../../envs/sts.yaml"
    threads: lambda wildcards: CONFIGS[wildcards.ablation].align.threads
    resources:
        gpu=lambda wildcards: GPUS and CONFIGS[wildcards.ablation].align.processes,
    params:
        config=lambda wildcards: config_file(wildcards.ablation),
        launch=lambda wildcards: launch(CONFIGS[wildcards.ablation].align),
        settings=lambda wildcards: settings.config_hash(
            CONFIGS[wildcards.ablation].align.identity()
        ),
        code=lambda wildcards: training_code(CONFIGS[wildcards.ablation].align),
    message:
        "align {wildcards.ablation}, seed {wildcards.seed}"
    shell:
        "{params.launch} train --config {params.config} --ablation {wildcards.ablation}"
        " --seed {wildcards.seed} --stage align --data {input.data} --init {input.init}"
        " --out {output} > {log} 2>&1"


rule instruct:
    input:
        init="<results>/runs/{ablation}/seed{seed}/align.json",
        data=lambda wildcards: prepared(CONFIGS[wildcards.ablation].instruct.data),
    output:
        "<results>/runs/{ablation}/seed{seed}/instruct.json",
    log:
        "<results>/logs/runs/{ablation}/seed{seed}/instruct.log",
    wildcard_constraints:
        ablation="|".join(owners("instruct")),
    conda:
        "../../envs/sts.yaml"
    threads: lambda wildcards: CONFIGS[wildcards.ablation].instruct.threads
    resources:
        gpu=lambda wildcards: GPUS and CONFIGS[wildcards.ablation].instruct.processes,
    params:
        config=lambda wildcards: config_file(wildcards.ablation),
        launch=lambda wildcards: launch(CONFIGS[wildcards.ablation].instruct),
        settings=lambda wildcards: settings.config_hash(
            CONFIGS[wildcards.ablation].instruct.identity()
        ),
        code=lambda wildcards: training_code(CONFIGS[wildcards.ablation].instruct),
    message:
        "instruct {wildcards.ablation}, seed {wildcards.seed}"
    shell:
        "{params.launch} train --config {params.config} --ablation {wildcards.ablation}"
        " --seed {wildcards.seed} --stage instruct --data {input.data} --init {input.init}"
        " --out {output} > {log} 2>&1"


rule share:
    input:
        owned,
    output:
        "<results>/runs/{ablation}/seed{seed}/{stage}.json",
    log:
        "<results>/logs/runs/{ablation}/seed{seed}/{stage}.log",
    conda:
        "../../envs/sts.yaml"
    message:
        "{wildcards.stage} {wildcards.ablation}, seed {wildcards.seed}: as {input}"
    shell:
        "cp {input} {output} > {log} 2>&1"


# Where another ablation trains a stage in the same way, its manifest is taken.
ruleorder: align > instruct > share
