# From data to tables: `snakemake --cores all` (docs/workflow.md says what else it can do).
# The rules are in workflow/rules, a scale in workflow/config, the runs in workflow/ablations.yaml.
from snakemake.utils import min_version

min_version("9.17")


configfile: "workflow/config/mini.yaml"


report: "workflow/report/overview.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/recovery.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/studies.smk"
include: "workflow/rules/search.smk"
include: "workflow/rules/progress.smk"


if workflow.is_main_process:
    count_begun() if workflow.output_settings.dryrun else recover_from_kill()


onstart:
    check_environment()
    warn_of_ablations()
    write_configs()
    prepare_cluster()
    redate_future()
    show_progress()


onsuccess:
    end_progress()
    close_tracking("FINISHED")
    if Path(f"{RESULTS}/tables/main.md").exists():
        print(f"Results: {RESULTS}/tables, {RESULTS}/figures; report: `{report_command()}`")
    if Path(PLAN.page).exists():
        print(f"All on one page, for a browser: {PLAN.page}")


onerror:
    end_progress()
    show_failed_logs(log)
    close_tracking("FAILED")


rule all:
    default_target: True
    input:
        tables([MAIN]),
        figures(figure_inputs()),
        PLAN.page,


check_table_names()

# Named targets: `snakemake --cores all NAME`.
for name, files in (TARGETS | SHORT_TARGETS).items():

    rule:
        name:
            name
        input:
            files,


check_targets()
