"""Prefect flows, one thin flow per verb; the only place that imports prefect."""
