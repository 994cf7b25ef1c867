"""How well boundaries between cells are found, slice by slice, from the probability of a boundary at each voxel.

V_rand and V_info are the foreground-restricted scores of Arganda-Carreras et al. 2015 (doi:10.3389/fnana.2015.00142),
the best over thresholds from 0.1 to 0.9, after the borders of each slice are thinned to lines of one voxel, by a
watershed from the components between them.

The pixel error is the share of wrong voxels at one half. That of the ISBI 2012 challenge, which its leader board and
the papers on it quote, is 1 - the maximal F-score of the voxels between boundaries, over those thresholds, of all
slices together (http://brainiac2.mit.edu/isbi_challenge/evaluation).
"""

import numpy as np
from scipy.ndimage import label as components
from scipy.sparse import coo_matrix
from skimage.segmentation import watershed

THRESHOLDS = np.arange(0.1, 0.95, 0.1)


def boundary_scores(boundary, truth):
    """Return (V_rand, V_info) of the components between boundaries, both arrays (z, y, x), slice by slice."""
    best = [0.0, 0.0]
    for threshold in THRESHOLDS:
        scores = []
        for likely, interior in zip(boundary, truth, strict=True):
            thinned = watershed(likely, components(likely <= threshold)[0], watershed_line=True)
            scores.append(scores_of(thinned, components(interior)[0]))
        best = [max(b, float(np.mean(s))) for b, s in zip(best, zip(*scores, strict=True), strict=True)]
    return tuple(best)


def challenge_error(boundary, truth):
    """Return the challenge's pixel error of the probability of a boundary and the true interior, (z, y, x)."""
    insides = [boundary <= threshold for threshold in THRESHOLDS]
    return 1 - max(2 * (inside & truth).sum() / (inside.sum() + truth.sum()) for inside in insides)


def scores_of(found, true):
    """Return the Rand and information scores of two segmentations, over the voxels that are in the truth's foreground.

    A voxel on a boundary of what was found is a segment of its own.
    """
    counted = true > 0
    found, true = found[counted].astype(np.int64), true[counted]
    alone = found == 0
    found[alone] = found.max() + 1 + np.arange(alone.sum())
    joint = coo_matrix((np.ones(len(found)), (found, true))).tocsr()
    joint.sum_duplicates()
    p, s, t = (each / len(found) for each in (joint.data, joint.sum(1).A1, joint.sum(0).A1))
    p, s, t = p[p > 0], s[s > 0], t[t > 0]
    rand = 2 * (p**2).sum() / ((s**2).sum() + (t**2).sum())
    h_s, h_t = -(s * np.log(s)).sum(), -(t * np.log(t)).sum()
    mutual = h_s + h_t + (p * np.log(p)).sum()
    return rand, 2 * mutual / (h_s + h_t) if h_s + h_t else 1.0
