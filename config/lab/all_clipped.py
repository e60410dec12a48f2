# A clip a hundredth as long as the gradients are.

include('healthy.py')
out_dir = 'out-lab-all-clipped'
grad_clip = 0.01
