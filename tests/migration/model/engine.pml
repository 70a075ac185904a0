/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The engine: migration/free-page-hint.c. Its own lock is a leaf: a step each. */

#define free_page_hint_asking() (state == ASKED || state == REPORTING)
#define free_page_hint_has_room() (len(queue) < QUEUE_RUNS)

#ifdef M24
#define EXPIRED 0
#else
#define EXPIRED expired
#endif

#ifdef M22
#define IS_HINT_ID(id) 1
#else
#define IS_HINT_ID(id) (id == hint_id)
#endif
#define free_page_hint_wanted(id) \
	(free_page_hint_asking() && IS_HINT_ID(id) && !complete && !reason)

inline free_page_hint_submit(id, page)
{
	d_step {
		if
		:: free_page_hint_wanted(id) -> state = REPORTING; queue!page
		:: else ->
			if
			:: free_page_hint_asking() && id != hint_id -> MARK(hint_of_earlier_request)
			:: else
			fi
		fi
	}
}

inline free_page_hint_end(id)
{
	d_step {
		if
		:: free_page_hint_wanted(id) -> complete = 1
		:: else
		fi
	}
}

inline free_page_hint_abort()
{
	d_step {
		if
		:: (free_page_hint_asking() || state == ARMING || state == SCANNING) && !complete ->
			reason = 1
		:: else
		fi
	}
}
