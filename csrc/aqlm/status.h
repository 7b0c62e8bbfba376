/* status.h: what every function of the core returns. */
#ifndef AQLM_STATUS_H
#define AQLM_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum aqlm_status {
    AQLM_OK = 0,
    AQLM_BAD_ARGUMENT, /* a size, flag or code is outside its documented range */
    AQLM_NO_MEMORY,
    AQLM_NOT_POSITIVE, /* H is not positive definite after damping, or holds NaN or Inf */
    AQLM_CANCELLED     /* the loop runner's poll function asked to stop */
} aqlm_status;

const char *aqlm_status_text(aqlm_status status);

#ifdef __cplusplus
}
#endif
#endif
