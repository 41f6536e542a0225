"""The Streamlit dashboard. Nothing is here yet: `moe-lens report` shows a trace in the terminal."""
