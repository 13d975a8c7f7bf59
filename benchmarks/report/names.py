"""How settings and metrics are called, in text and figures."""

from benchmarks.report.records import Metric, Setting


def setting_name(setting: Setting) -> str:
    """Returns a setting's name, such as `lm, adamw, 12 layers`."""
    return f"{run_name(setting)}, {setting.layers} layers"


def run_name(setting: Setting) -> str:
    """Returns the name of a setting's file, such as `lm, adamw`."""
    preset = "" if setting.preset == "full" else f", {setting.preset}"
    return f"{setting.task}, {setting.optimizer}{preset}"


def metric_name(metric: Metric) -> str:
    """Returns a metric's name with its unit."""
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def metric_text(metric: Metric) -> str:
    """Returns a metric's name, unit and direction."""
    return f"{metric_name(metric)}, {better(metric)}"


def better(metric: Metric) -> str:
    """Returns the direction in which a metric is better."""
    return "lower is better" if metric.sign > 0 else "higher is better"
