# What a run is worth, and what it cost. The benchmark of training time has the machine to itself.

# Beside the trainings a timing follows the files that take the time and count the FLOPs.
TIMED = ["measure/bench.py", "cost/counting.py", "cost/flops.py", "cost/history.py"]


rule bench:
    input:
        PLAN.timing(MAIN),


rule evaluate:
    input:
        run=lambda wildcards: PLAN.manifest(**wildcards, stage=CONFIGS[wildcards.ablation].last),
        data=lambda wildcards: benchmark_data(wildcards.ablation),
    output:
        "<results>/runs/{ablation}/seed{seed}/eval.json",
    log:
        "<results>/logs/runs/{ablation}/seed{seed}/eval.log",
    conda:
        "../../envs/sts.yaml"
    threads: lambda wildcards: cluster.cores(evaluation_of(wildcards))
    resources:
        **requested("evaluate/{wildcards.ablation}"),
        gpu=lambda wildcards: gpus(evaluation_of(wildcards).processes),
    params:
        config=lambda wildcards: config_file(wildcards.ablation),
        # what depends on `threads` is not followed: the result is that of any number of processes
        launch=lambda wildcards, threads: cluster.launch(evaluation_of(wildcards)),
        follows=lambda wildcards: follows.of_evaluation(CONFIGS[wildcards.ablation]),
    message:
        "evaluate {wildcards.ablation}, seed {wildcards.seed}"
    shell:
        "{params.launch} evaluate --config {params.config} --ablation {wildcards.ablation}"
        " --seed {wildcards.seed} --run {input.run} --data {input.data}"
        " --follows {params.follows} --out {output} > {log} 2>&1"


rule timing:
    input:
        lambda wildcards: unique(map(PLAN.backbone, PLAN.members(wildcards.group))),
        data=lambda wildcards: prepared(
            name for stage in PLAN.stages(wildcards.group) for name in stage.data
        ),
    output:
        "<results>/bench/{group}.json",
    log:
        "<results>/logs/bench/{group}.log",
    conda:
        "../../envs/sts.yaml"
    threads: timing_threads
    resources:
        **requested("timing/{wildcards.group}"),
        **several_nodes(widest_of_group),
        gpu=lambda wildcards: gpus(widest_of_group(wildcards).processes) if CLUSTER else GPUS,
        nodes=lambda wildcards: widest_of_group(wildcards).nodes,
    params:
        bench=timing_command,
        values=lambda wildcards: config_hash(
            SCALE.bench,
            *(
                {**stage.identity(), "rows": stage.batch_size}
                for stage in PLAN.stages(wildcards.group)
            ),
        ),
        code=lambda wildcards: [
            training_code(id, *CONFIGS[id].stages, also=TIMED)
            for id in PLAN.members(wildcards.group)
        ],
    message:
        "training time of the group {wildcards.group}"
    shell:
        "({params.bench}) > {log} 2>&1"
