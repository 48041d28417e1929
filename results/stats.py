from data.report import pass_at_k, standard_error
