"""Pure functions over routing that SQL says badly: numpy and pandas in, numbers out."""
