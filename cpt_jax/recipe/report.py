"""placeholder"""
from pathlib import Path
def domain_table(entries, domains):
    return "\n".join(f"{e['stage']:12} {e['weights']:5} {e['domain']:10} {e['bits_per_byte']:.4f}" for e in entries)
def write_report(run): (Path(run)/'report.html').write_text('')
def compare_reports(runs,out): ...
