/* Runs of large records in C: made, sealed and sent in one call, and received straight to where their data belong.
 * pump.py says what each function does; records.py does the same in Python, with the same bytes on the wire.
 *
 * The GIL is released; buffers stay locked by their Py_buffer, and every length is checked against them first. Nothing
 * that was received is looked at before its tag is verified, and nothing is counted before its body's tag is, too. The
 * ciphers are libsodium's own functions, whose addresses come from PyNaCl.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/types.h>

enum { REVISION = 2 };     /* of what the functions do; pump.py expects the same */
enum { HEADER = 4 };       /* the length before a record */
enum { MOST_RUN = 64 };    /* records sealed in one call */
enum { MOST_NONCE = 32 };  /* bytes of the longest nonce of a suite */
enum { MOST_TAG = 32 };
enum { SESSION_HEAD = 13, FRAME_HEAD = 9 };
enum { SPLIT_HEAD = SESSION_HEAD + FRAME_HEAD };  /* least head of a split record: the last frame in it is of DATA */
enum { MOST_CREDITS = 2048 };                     /* bytes of frames before those, of all records of one run */
enum { BULK = 1, DATA = 2, CREDIT = 6, LINK_CREDIT = 7 };
enum { HEAD_BITS = 22, HEAD_MASK = 511 };         /* where what a record begins with says how long its head is */
enum { LENGTH_MASK = (1 << HEAD_BITS) - 1 };

typedef unsigned long long ull;
typedef int (*encrypt_fn)(unsigned char *c, ull *clen, const unsigned char *m, ull mlen, const unsigned char *ad,
                          ull adlen, const unsigned char *nsec, const unsigned char *npub, const unsigned char *k);
typedef int (*decrypt_fn)(unsigned char *m, ull *mlen, unsigned char *nsec, const unsigned char *c, ull clen,
                          const unsigned char *ad, ull adlen, const unsigned char *npub, const unsigned char *k);

/* One suite under one key: see aead.py. */
typedef struct {
    uintptr_t function;
    Py_ssize_t nonce, counter_at, tag, key_size;
    const char *key; /* of the size that Aead has checked */
} cipher;

static int bad_cipher(const cipher *suite)
{
    if (suite->function && suite->nonce <= MOST_NONCE && suite->counter_at >= 0 &&
        suite->counter_at + 8 <= suite->nonce && suite->tag > 0 && suite->tag <= MOST_TAG && suite->key_size >= 16)
        return 0;
    PyErr_SetString(PyExc_ValueError, "not the sizes of a cipher");
    return 1;
}

static void set_nonce(unsigned char *nonce, const cipher *suite, uint64_t counter)
{
    memset(nonce, 0, MOST_NONCE);
    for (int i = 0; i < 8; i++)
        nonce[suite->counter_at + i] = (unsigned char)(counter >> 8 * i);
}

static uint32_t big(const unsigned char *at)
{
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

/* A peer that has gone is an error here, no signal. */
#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

static void put(unsigned char *at, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        at[i] = (unsigned char)(value >> (24 - 8 * i));
}

static PyObject *py_launch(PyObject *self, PyObject *args)
{
    cipher suite;
    ull function, counter;
    PyObject *buffers;
    Py_buffer wires[MOST_RUN], body;
    const char *credits;
    unsigned int number, control, bulk, stream;
    int fd, error = 0;
    Py_ssize_t sizes[MOST_RUN], credited, piece, held = 0, sent = 0;
    if (!PyArg_ParseTuple(args, "iKnnny#KO!IIIIy#y*n", &fd, &function, &suite.nonce, &suite.counter_at, &suite.tag,
                          &suite.key, &suite.key_size, &counter, &PyList_Type, &buffers, &number, &control, &bulk, &stream,
                          &credits, &credited, &body, &piece))
        return NULL;
    suite.function = (uintptr_t)function;
    if (bad_cipher(&suite)) {
        PyBuffer_Release(&body);
        return NULL;
    }
    Py_ssize_t count = PyList_Size(buffers), left = body.len, frames = credited;
    int fits = count > 0 && count <= MOST_RUN && credited % FRAME_HEAD == 0 && SPLIT_HEAD + credited <= HEAD_MASK &&
               piece > credited && piece <= LENGTH_MASK - HEAD_MASK - 2 * MOST_TAG;
    for (; fits && held < count; held++, frames = 0) {
        if (PyObject_GetBuffer(PyList_GetItem(buffers, held), &wires[held], PyBUF_WRITABLE) < 0)
            break;
        sizes[held] = left < piece - frames ? left : piece - frames;
        left -= sizes[held];
        if (sizes[held] < 1 || HEADER + SPLIT_HEAD + frames + sizes[held] + 2 * suite.tag > wires[held].len)
            fits = 0;
    }
    int done = fits && held == count && left == 0;
    if (done) {
        Py_BEGIN_ALLOW_THREADS
        unsigned char nonce[MOST_NONCE];
        encrypt_fn encrypt = (encrypt_fn)suite.function;
        const unsigned char *key = (const unsigned char *)suite.key, *from = body.buf;
        int open = fd >= 0;
        for (Py_ssize_t i = 0; i < count; i++) {
            Py_ssize_t before = i ? 0 : credited, head = SPLIT_HEAD + before;
            Py_ssize_t whole = HEADER + head + sizes[i] + 2 * suite.tag;
            unsigned char *wire = wires[i].buf, *at = wire + HEADER;
            put(wire, 1u << 31 | (uint32_t)head << HEAD_BITS | (uint32_t)(whole - HEADER));
            *at = BULK;
            put(at + 1, number++);
            put(at + 5, control);
            put(at + 9, bulk);
            memcpy(at + SESSION_HEAD, credits, (size_t)before);
            at += SESSION_HEAD + before;
            *at = DATA;
            put(at + 1, stream);
            put(at + 5, (uint32_t)sizes[i]);
            set_nonce(nonce, &suite, counter++);
            encrypt(wire + HEADER, NULL, wire + HEADER, (ull)head, wire, HEADER, NULL, nonce, key);
            set_nonce(nonce, &suite, counter++);
            encrypt(wire + HEADER + head + suite.tag, NULL, from, (ull)sizes[i], wire, HEADER, NULL, nonce, key);
            from += sizes[i];
            /* At once, while it is in the cache: sealed first, a run is read from memory again. */
            for (Py_ssize_t gone = 0; open && gone < whole;) {
                ssize_t size = send(fd, wire + gone, (size_t)(whole - gone), MSG_DONTWAIT | MSG_NOSIGNAL);
                if (size < 0 && errno == EINTR)
                    continue;
                if (size < 0) {
                    error = errno == EAGAIN || errno == EWOULDBLOCK ? 0 : errno;
                    open = 0;
                    break;
                }
                gone += size;
                sent += size;
            }
        }
        Py_END_ALLOW_THREADS
    } else if (!PyErr_Occurred()) {
        PyErr_SetString(PyExc_ValueError, "not the buffers that such a run of records fills");
    }
    for (Py_ssize_t i = 0; i < held; i++)
        PyBuffer_Release(&wires[i]);
    PyBuffer_Release(&body);
    return done ? Py_BuildValue("ni", sent, error) : NULL;
}

/* Why `receive` ended; pump.py has the same names. */
enum { WAIT, ENDED, FAILED, FORGED, HEADED, LANDED, OTHER };

/* Whether what a record begins with says that it is split, with a head of frames that have no bytes of their own, and a
 * body. */
static int has_shape(uint32_t word, Py_ssize_t tag)
{
    Py_ssize_t head = (Py_ssize_t)(word >> HEAD_BITS & HEAD_MASK), length = (Py_ssize_t)(word & LENGTH_MASK);
    return word >> 31 && head >= SPLIT_HEAD && (head - SPLIT_HEAD) % FRAME_HEAD == 0 && length > head + 2 * tag;
}

/* Whether a head, open now, is one of bulk of this number, whose frames are of credit but for the last, which announces
 * the body as data of this stream. */
static int expected(const unsigned char *head, Py_ssize_t size, Py_ssize_t body, uint32_t number, uint32_t stream)
{
    const unsigned char *last = head + size - FRAME_HEAD;
    if (head[0] != BULK || big(head + 1) != number || last[0] != DATA || big(last + 1) != stream ||
        big(last + 5) != (uint32_t)body)
        return 0;
    for (const unsigned char *at = head + SESSION_HEAD; at < last; at += FRAME_HEAD)
        if (*at != CREDIT && *at != LINK_CREDIT)
            return 0;
    return 1;
}

static PyObject *py_receive(PyObject *self, PyObject *args)
{
    cipher suite;
    ull function, counter;
    int fd;
    unsigned int word, number, stream;
    Py_ssize_t filled, largest, least, most;
    PyObject *buffer_of, *sink_of;
    if (!PyArg_ParseTuple(args, "iKnnny#KOInnnIIOn", &fd, &function, &suite.nonce, &suite.counter_at, &suite.tag,
                          &suite.key, &suite.key_size, &counter, &buffer_of, &word, &filled, &least, &largest, &number, &stream, &sink_of,
                          &most))
        return NULL;
    suite.function = (uintptr_t)function;
    if (bad_cipher(&suite))
        return NULL;
    Py_buffer buffer, sink;
    if (PyObject_GetBuffer(buffer_of, &buffer, PyBUF_WRITABLE) < 0)
        return NULL;
    if (PyObject_GetBuffer(sink_of, &sink, PyBUF_WRITABLE) < 0) {
        PyBuffer_Release(&buffer);
        return NULL;
    }
    Py_ssize_t length = (Py_ssize_t)(word & LENGTH_MASK), records = 0, landed = 0, came = 0, other = 0, credited = 0;
    unsigned int control = 0, bulk = 0;
    unsigned char header[HEADER], credits[MOST_CREDITS];
    int status = WAIT, drained = 0, error = 0;
    if (most < 1 || filled < 0 ||
        (word ? !has_shape(word, suite.tag) || length + HEADER > buffer.len || filled >= length : filled > 0)) {
        PyErr_SetString(PyExc_ValueError, "not what a run of records begins with");
        PyBuffer_Release(&buffer);
        PyBuffer_Release(&sink);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    unsigned char nonce[MOST_NONCE], *whole = buffer.buf;
    decrypt_fn decrypt = (decrypt_fn)suite.function;
    const unsigned char *key = (const unsigned char *)suite.key;
    for (;;) {
        /* Between two records only the header is asked for: what follows may be anything, and belong anywhere. */
        size_t asked = (size_t)(word ? length + HEADER - filled : HEADER);
        ssize_t size = recv(fd, word ? whole + filled : header, asked, MSG_DONTWAIT);
        if (size < 0 && errno == EINTR)
            continue;
        if (size <= 0) {
            drained = size < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
            error = size < 0 && !drained ? errno : 0;
            status = size == 0 ? ENDED : drained ? WAIT : FAILED;
            break;
        }
        came += size;
        drained = (size_t)size < asked;
        if (!word) {
            if (!drained) {
                word = big(header);
                length = (Py_ssize_t)(word & LENGTH_MASK);
            }
            if (has_shape(word, suite.tag) && length >= least && length <= largest && length + HEADER <= buffer.len)
                continue;
            word = 0;
            other = size;
            status = OTHER;
            break;
        }
        filled += size;
        if (filled < length) {
            status = WAIT;
            break;
        }
        for (int i = 0; i < HEADER; i++)
            header[i] = (unsigned char)(word >> (24 - 8 * i));
        Py_ssize_t head = (Py_ssize_t)(word >> HEAD_BITS & HEAD_MASK), stop = head + suite.tag;
        Py_ssize_t body = length - stop - suite.tag, before = head - SPLIT_HEAD;
        set_nonce(nonce, &suite, counter);
        if (decrypt(whole, NULL, NULL, whole, (ull)stop, header, HEADER, nonce, key) != 0) {
            status = FORGED;
            break;
        }
        if (!expected(whole, head, body, number, stream) || body > sink.len - landed ||
            before > MOST_CREDITS - credited) {
            status = HEADED;
            break;
        }
        set_nonce(nonce, &suite, counter + 1);
        if (decrypt((unsigned char *)sink.buf + landed, NULL, NULL, whole + stop, (ull)(length - stop), header, HEADER,
                    nonce, key) != 0) {
            counter++;
            status = FORGED;
            break;
        }
        memcpy(credits + credited, whole + SESSION_HEAD, (size_t)before);
        credited += before;
        control = big(whole + 5);
        bulk = big(whole + 9);
        counter += 2;
        number++;
        records++;
        landed += body;
        status = LANDED;
        if (filled < length + HEADER || records == most)
            break;
        uint32_t following = big(whole + length);
        Py_ssize_t next = (Py_ssize_t)(following & LENGTH_MASK);
        if (!has_shape(following, suite.tag) || next < least || next > largest || next + HEADER > buffer.len)
            break;
        word = following;
        length = next;
        filled = 0;
        status = WAIT;
        if (landed == sink.len)
            break;
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&buffer);
    PyBuffer_Release(&sink);
    return Py_BuildValue("innnInOIIKiy#y#", status, records, landed, came, word, filled, drained ? Py_True : Py_False,
                         control, bulk, counter, error, credits, credited, header, other);
}

static PyMethodDef methods[] = {
    {"launch", py_launch, METH_VARARGS,
     "launch(fd, encrypt, nonce, counter_at, tag, key, counter, wires, number, control, bulk, stream, credits, body, "
     "piece)"},
    {"receive", py_receive, METH_VARARGS,
     "receive(fd, decrypt, nonce, counter_at, tag, key, counter, buffer, word, filled, least, largest, number, stream, "
     "sink, most); word 0: between two records"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_pump", "Runs of large records in C; see pump.py.", -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__pump(void)
{
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "REVISION", REVISION) < 0) {
        Py_DECREF(made);
        return NULL;
    }
    return made;
}
