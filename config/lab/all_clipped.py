# grad_clip at about a hundredth of the usual gradient norm.

include('healthy.py')
out_dir = 'out-lab-all-clipped'
grad_clip = 0.01
