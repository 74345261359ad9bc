def evaluate_run(run_dir, experiment):
    return "x"
