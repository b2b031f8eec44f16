import { ConversationItem } from './ConversationItem.tsx';
import { Icon } from './Icon.tsx';
import { type List, routeOf } from './list.ts';
import { useStore } from './store.ts';

interface Props {
  list: List;
  current: string | null;
  onNew: () => void;
  onChosen: () => void;
  onLeave: () => void;
}

export function Sidebar({ list, current, onNew, onChosen, onLeave }: Props) {
  const { conversations, search, next, status } = useStore(list.state);
  return (
    <nav className="sidebar" aria-label="Conversations">
      <div className="brand">
        <Icon name="brand" />
        Anynode
      </div>
      <button type="button" className="new" onClick={onNew}>
        <Icon name="new" />
        New conversation
      </button>
      <label className="search">
        <Icon name="search" />
        <input
          type="search"
          aria-label="Search conversations"
          placeholder="Search"
          value={search}
          maxLength={100}
          onChange={({ target }) => list.search(target.value)}
        />
      </label>
      {status === 'loaded' && conversations.length === 0 && (
        <p className="quiet">{search ? 'Nothing has that in its title.' : 'Nothing yet.'}</p>
      )}
      {status === 'failed' && <p className="quiet">The list could not be read.</p>}
      <ul>
        {conversations.map((each) => (
          <ConversationItem
            key={each.id}
            listed={each}
            isCurrent={routeOf(each) === current}
            list={list}
            onChosen={onChosen}
            onDeletedCurrent={onNew}
          />
        ))}
      </ul>
      {next !== null && (
        <button type="button" className="quiet" onClick={list.more}>
          Show more
        </button>
      )}
      <button type="button" className="leave quiet" onClick={onLeave}>
        Sign out
      </button>
    </nav>
  );
}
