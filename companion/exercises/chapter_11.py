CHECKS: dict = {"11.1": None, "11.2": None, "11.3": None, "11.4": None}
