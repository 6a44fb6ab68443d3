"""The demo: all shipped pipelines on the embedded model and a rendered data set."""
