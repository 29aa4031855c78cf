"""The data set of the mini scale, in the form of sts/pipeline/data/sets."""
