def check_draft(draft_dir, target_config):
    pass
