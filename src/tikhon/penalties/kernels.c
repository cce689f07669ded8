/* Proxes in one pass over memory. REAL is float or double, given by -DREAL=...

   A comparison with NaN is false; the operands stand such that NaN comes through. */
#include <float.h>
#include <stddef.h>
#include <tgmath.h>

#define LARGEST (sizeof(REAL) == sizeof(float) ? (REAL)FLT_MAX : (REAL)DBL_MAX)
#define TINIEST (sizeof(REAL) == sizeof(float) ? (REAL)FLT_MIN : (REAL)DBL_MIN)
#define EPSILON (sizeof(REAL) == sizeof(float) ? FLT_EPSILON : DBL_EPSILON)
#define SAFE 1e-9 /* squares between this and its inverse are summed in REAL, */
#define CHUNK 256 /* so many at a time */
#define PART 4096 /* entries that stay in the nearest cache with their moments */

static inline REAL soft(REAL w, REAL threshold)
{
    REAL clipped = w < threshold ? w : threshold;
    return w - (clipped > -threshold ? clipped : -threshold);
}

/* L1 (`size`) and ElasticNet (with `ridge`, the L2 part). The step of an entry is
   1 / (sqrt(moment) + eps), or 1 without a moment. Divisions cost more than all the rest. */
static void entries(REAL *restrict w, const REAL *restrict moment, ptrdiff_t count, double size,
                    double ridge, double eps)
{
    const REAL first = size, second = ridge, added = eps, largest = sqrt(LARGEST);
    if (!moment && ridge == 0)
        for (ptrdiff_t i = 0; i < count; i++)
            w[i] = soft(w[i], first);
    else if (!moment)
        for (ptrdiff_t i = 0; i < count; i++)
            w[i] = soft(w[i], first) / (1 + second);
    else if (ridge == 0)
        for (ptrdiff_t i = 0; i < count; i++)
            w[i] = soft(w[i], first / (sqrt(moment[i]) + added));
    else
        for (ptrdiff_t i = 0; i < count; i++) {
            REAL root = sqrt(moment[i]) + added;
            root = root > largest ? largest : root; /* of a moment that has overflowed */
            w[i] = soft(w[i] * root, first) / (root + second);
        }
}

/* Norm of a row: short sums in REAL, unless squares overflow or vanish. */
static double norm_of(const REAL *restrict row, ptrdiff_t length)
{
    double square = 0;
    for (ptrdiff_t start = 0; start < length; start += CHUNK) {
        const ptrdiff_t end = start + CHUNK < length ? start + CHUNK : length;
        REAL part = 0;
#pragma omp simd reduction(+ : part)
        for (ptrdiff_t j = start; j < end; j++)
            part += row[j] * row[j];
        square += part;
    }
    if (square > SAFE && square < 1 / SAFE)
        return sqrt(square);
    square = 0;
    for (ptrdiff_t j = 0; j < length; j++)
        square += (double)row[j] * row[j];
    return sqrt(square);
}

/* A row times max(0, 1 - size/|row|). */
static void shrink(REAL *restrict row, ptrdiff_t length, double size)
{
    const double norm = norm_of(row, length);
    const REAL kept = norm <= size ? 0 : 1 - size / norm;
    for (ptrdiff_t j = 0; j < length; j++)
        row[j] *= kept;
}

/* Root t of |row / (t + steps)| = 1, or 0 if there is none above 0: Newton's method on
   1/|row / (t + steps)|, which is concave and increasing, so that from the second iterate on it
   rises to the root. */
static double norm_after(const REAL *restrict row, const REAL *restrict steps, ptrdiff_t length,
                         double start)
{
    double t = start > 0 ? start : 0;
    for (int i = 0; i < 60; i++) {
        const REAL now = t;
        double square = 0, slope = 0;
#pragma omp simd reduction(+ : square, slope)
        for (ptrdiff_t j = 0; j < length; j++) {
            REAL inverse = 1 / (now + steps[j]);
            double ratio = row[j] * inverse;
            square += ratio * ratio;
            slope += ratio * ratio * inverse;
        }
        if (square == 0)
            return 0;
        double before = t, change = (sqrt(square) - 1) * square / slope;
        t = t + change < 0 ? 0 : t + change;
        if (!(fabs(t - before) > 0.01 * sqrt(EPSILON) * t))
            break;
    }
    return t;
}

/* The same where the step of an entry is 1 / (sqrt(moment) + eps); `steps` is room for them.
   For small steps the root is |row| - mean, the mean of the steps under row^2/|row|^2: the next
   term of the series is 3/2 variance/|row|. */
static void shrink_in_metric(REAL *restrict row, const REAL *restrict moment, ptrdiff_t length,
                             REAL size, REAL eps, REAL *restrict steps)
{
    double square = 0, moved = 0, spread = 0;
    REAL largest = 0;
    for (ptrdiff_t start = 0; start < length; start += CHUNK) {
        const ptrdiff_t end = start + CHUNK < length ? start + CHUNK : length;
        REAL squares = 0, moves = 0, spreads = 0;
#pragma omp simd reduction(+ : squares, moves, spreads) reduction(max : largest)
        for (ptrdiff_t j = start; j < end; j++) {
            REAL step = size / (sqrt(moment[j]) + eps);
            step = step < TINIEST ? TINIEST : step;
            step = step > LARGEST ? LARGEST : step;
            steps[j] = step;
            const REAL squared = row[j] * row[j], weighed = squared * step;
            squares += squared;
            moves += weighed;
            spreads += weighed * step;
            largest = step > largest ? step : largest;
        }
        square += squares;
        moved += moves;
        spread += spreads;
    }
    double root;
    if (!(square > SAFE && square + spread < 1 / SAFE))
        root = norm_after(row, steps, length, norm_of(row, length));
    else {
        root = sqrt(square) - moved / square;
        if (!(12 * spread <= EPSILON * square * square))
            root = norm_after(row, steps, length, root);
    }
    const REAL t = root, inverse = 1 / root;
    if (largest < 0.5 * cbrt(EPSILON) * root) /* s/(t + s) = r - r^2 + r^3, r = s/t */
        for (ptrdiff_t j = 0; j < length; j++) {
            const REAL ratio = steps[j] * inverse;
            row[j] -= row[j] * (ratio - ratio * ratio);
        }
    else
        for (ptrdiff_t j = 0; j < length; j++)
            row[j] -= row[j] * (steps[j] / (t + steps[j]));
}

/* Entries at least `least`, for the next step; written only where some are below. */
static void lift(REAL *restrict moment, ptrdiff_t count, REAL least)
{
    REAL smallest = least;
#pragma omp simd reduction(min : smallest)
    for (ptrdiff_t i = 0; i < count; i++)
        smallest = moment[i] < smallest ? moment[i] : smallest;
    if (smallest < least)
        for (ptrdiff_t i = 0; i < count; i++)
            moment[i] = moment[i] < least ? least : moment[i];
}

/* One prox in place. `length` is that of a row of GroupLasso, 0 for single entries; a moment is
   lifted to `least` while it lies in the cache. */
struct job {
    REAL *w, *moment;
    ptrdiff_t count, length;
    double size, ridge, eps, least;
};

/* The jobs one after another; `room` holds the longest row. */
void run(const struct job *jobs, ptrdiff_t count, REAL *room)
{
    for (const struct job *job = jobs; job < jobs + count; job++) {
        const ptrdiff_t each = job->length ? job->length : PART;
        for (ptrdiff_t i = 0; i < job->count; i += each) {
            const ptrdiff_t size = each < job->count - i ? each : job->count - i;
            REAL *w = job->w + i, *moment = job->moment ? job->moment + i : NULL;
            if (!job->length)
                entries(w, moment, size, job->size, job->ridge, job->eps);
            else if (moment)
                shrink_in_metric(w, moment, size, job->size, job->eps, room);
            else
                shrink(w, size, job->size);
            if (moment && job->least > 0)
                lift(moment, size, job->least);
        }
    }
}
