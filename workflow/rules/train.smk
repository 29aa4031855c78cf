# One stage of a run, whichever. A job's output is a small manifest; the weights lie beside it
# undeclared, so that no failure and no rerun deletes them. A job follows the values and formulas
# in `params`.


rule train:
    input:
        init=lambda wildcards: PLAN.start_of(**wildcards),
        data=lambda wildcards: prepared(stage_of(wildcards).data),
    output:
        "<results>/runs/{ablation}/seed{seed}/{stage}.json",
    log:
        "<results>/logs/runs/{ablation}/seed{seed}/{stage}.log",
    wildcard_constraints:
        ablation=trained_by(itself=True),
    conda:
        "../../envs/sts.yaml"
    threads: lambda wildcards: cluster.cores(stage_of(wildcards))
    resources:
        **requested("train/{wildcards.ablation}/{wildcards.stage}"),
        **several_nodes(stage_of),
        gpu=lambda wildcards: gpus(stage_of(wildcards).processes),
        nodes=lambda wildcards: stage_of(wildcards).nodes,
    params:
        config=lambda wildcards: config_file(wildcards.ablation),
        launch=lambda wildcards: cluster.launch(stage_of(wildcards)),
        follows=lambda wildcards: follows.of_training(CONFIGS[wildcards.ablation], wildcards.stage),
    message:
        "{wildcards.stage} {wildcards.ablation}, seed {wildcards.seed}"
    shell:
        "{params.launch} train --config {params.config} --ablation {wildcards.ablation}"
        " --seed {wildcards.seed} --stage {wildcards.stage} --data {input.data}"
        " --init {input.init} --follows {params.follows} --out {output} > {log} 2>&1"


# Where another ablation trains a stage in the same way, its manifest is taken.
rule share:
    input:
        lambda wildcards: PLAN.manifest(
            PLAN.trainer(wildcards.ablation, wildcards.stage), wildcards.seed, wildcards.stage
        ),
    output:
        "<results>/runs/{ablation}/seed{seed}/{stage}.json",
    log:
        "<results>/logs/runs/{ablation}/seed{seed}/{stage}.log",
    wildcard_constraints:
        ablation=trained_by(itself=False),
    localrule: True
    conda:
        "../../envs/sts.yaml"
    message:
        "{wildcards.stage} {wildcards.ablation}, seed {wildcards.seed}: as {input}"
    shell:
        "cp {input} {output} > {log} 2>&1"
