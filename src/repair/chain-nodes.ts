/** The chain of a volume from everything that is known of its commits: frames in packs, and good segments. */
import type { SeqRange } from '../repo/history.js';

/** A commit, in few bytes. */
export interface ChainNode {
  readonly seq: number;
  readonly firstSeq: number;
  /** Hex. */
  readonly hash: string;
  /** Hash of the commit before `firstSeq`. */
  readonly prev: string;
  readonly epoch: number;
  readonly full: boolean;
  /** Where its frame is; undefined: only a segment knows it. */
  readonly place: { readonly packId: string; readonly frame: number } | undefined;
}

export interface ProvenChain {
  /** Runs of commits that continue each other, ascending; between two of them commits are lost. */
  readonly runs: readonly (readonly ChainNode[])[];
  readonly lost: readonly SeqRange[];
}

/**
 * Follows the predecessors from the tip (the highest epoch, and of it the highest sequence number). Where one is missing, goes on with the
 * highest commit before the gap that is left, by the same rule: it may be one that fell off the chain only if what replaced it is lost too.
 */
export function provenChain(nodes: readonly ChainNode[]): ProvenChain {
  const byHash = new Map<string, ChainNode>();
  for (const n of nodes) {
    const known = byHash.get(n.hash);
    // A merged commit counts before those it stands for; a commit whose frame is there before one that only a segment knows.
    const better =
      known === undefined ||
      n.firstSeq < known.firstSeq ||
      (n.firstSeq === known.firstSeq && known.place === undefined && n.place !== undefined);
    if (better) byHash.set(n.hash, n);
  }
  const ranked = [...byHash.values()].sort((a, b) => b.epoch - a.epoch || b.seq - a.seq);
  const runs: ChainNode[][] = [];
  const lost: SeqRange[] = [];
  let at = ranked[0];
  let run: ChainNode[] = [];
  while (at !== undefined) {
    run.push(at);
    if (at.firstSeq === 1) break;
    const need = at.firstSeq - 1;
    const before: ChainNode | undefined = byHash.get(at.prev);
    if (before !== undefined && before.seq === need) {
      at = before;
      continue;
    }
    runs.push(run.reverse());
    run = [];
    const epoch: number = at.epoch;
    const next: ChainNode | undefined = ranked.find((n) => n.seq < need && n.epoch <= epoch);
    lost.push({ firstSeq: (next?.seq ?? 0) + 1, lastSeq: need });
    at = next;
  }
  if (run.length > 0) runs.push(run.reverse());
  return { runs: runs.reverse(), lost: lost.reverse() };
}
