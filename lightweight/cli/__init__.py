"""What does each command of `lightweight` do: plan, train, sweep, calibrate, data, chat, report, gate?"""
