"""What happened: numbers to files and services, lines to the terminal.

metrics.py   names and formats of the metrics, declared once; metrics.jsonl
trackers.py  copies to TensorBoard and Weights & Biases
console.py   a live display on a terminal, plain lines elsewhere
"""
