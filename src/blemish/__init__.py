"""blemish: visual anomaly detection that learns from normal images."""


def __getattr__(name: str) -> object:
    if name in ("AnomalyDetector", "Result"):
        import blemish.api  # with torch and lightning, for which `import blemish` does not wait

        return getattr(blemish.api, name)
    raise AttributeError(f"module 'blemish' has no attribute {name!r}")
