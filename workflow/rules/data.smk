# Prepared data and the backbones that every run starts from.

REBUILDS = BASE.model.backbone == "rebuild"
SHIPPED = sorted(file for file in Path("data/backbones/mini").rglob("*") if file.is_file())
RECIPE = sorted((CODE / "mini").glob("*.py"))  # of the shipped backbones; a run follows their bytes


rule data:
    input:
        prepared(BASE.training_data() + BASE.evaluation_data()),


rule backbones:
    input:
        f"{RESULTS}/backbone_rebuilt/manifest.json",


rule prepare:
    output:
        "<data>/{dataset}/manifest.json",
    log:
        "<results>/logs/data/{dataset}.log",
    conda:
        "../../envs/sts.yaml"
    params:
        config=config_file(BASELINE),
        settings=lambda wildcards: preparation(wildcards.dataset),
        code=lambda wildcards: preparation_code(wildcards.dataset),
    message:
        "data set {wildcards.dataset}"
    shell:
        "python -m sts prepare --config {params.config} --dataset {wildcards.dataset}"
        " --out {output} > {log} 2>&1"


rule backbone:
    output:
        "<results>/backbone/manifest.json",
    log:
        "<results>/logs/backbone.log",
    conda:
        "../../envs/sts.yaml"
    params:
        config=config_file(BASELINE),
        settings=settings.config_hash(BASE.model),
        code=follows.code(CODE / "pipeline" / "model.py", *(RECIPE if REBUILDS else SHIPPED)),
    message:
        f"backbones: {BASE.model.backbone}"
    shell:
        "python -m sts backbone --config {params.config} --out {output} > {log} 2>&1"


rule rebuild:
    output:
        "<results>/backbone_rebuilt/manifest.json",
    log:
        "<results>/logs/backbone_rebuilt.log",
    conda:
        "../../envs/sts.yaml"
    threads: BASE.model.threads
    resources:
        gpu=GPUS and 1,
    params:
        config=config_file(BASELINE),
        settings=settings.config_hash(BASE.model),
        code=follows.code(CODE / "pipeline" / "model.py", *RECIPE),
    message:
        "backbones from scratch"
    shell:
        "python -m sts backbone --rebuild --config {params.config} --out {output} > {log} 2>&1"
