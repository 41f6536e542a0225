"""The Streamlit dashboard; `moe-lens dashboard` starts it."""
