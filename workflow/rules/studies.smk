# What the rules of the search ask: its settings, checked, and the configuration of a study.
from sts.pipeline.config import check_study, load_search

SEARCH_FILE = "workflow/config/search.yaml"


def loaded_search():
    try:
        return load_search(SEARCH_FILE)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


SEARCH = loaded_search()


def searched():
    """The results of all studies, which are checked before the first trial."""
    try:
        for name in SEARCH.studies:
            check_study(SEARCH, name, SEARCH_FILE, PLAN.ablations, SCALE)
    except ConfigError as error:
        raise WorkflowError(str(error)) from None
    return [f"{RESULTS}/search/{name}.json" for name in SEARCH.studies]


def searched_config(wildcards):
    return CONFIGS[SEARCH.studies[wildcards.study].ablation]
